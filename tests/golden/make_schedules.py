"""Record what the schedules of tf.keras return: `/work/env/tf/bin/python tests/golden/make_schedules.py [--check]`, TensorFlow 2.15 needed.

`schedules.npz` holds the configurations and steps as JSON and, for each dtype of the initial learning rate, one array of values with
the axes configuration, kind of step (see KINDS) and step. `--check` writes nothing and fails if the file differs.
"""

import json
import os
import sys
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
import tensorflow as tf

PATH = Path(__file__).with_name("schedules.npz")
DTYPES = (np.float16, np.float32, np.float64)
# an optimizer passes its counter cast to the dtype of the variable; users pass integers
KINDS = {"float32": np.float32, "float64": np.float64, "int": int}
RESTARTS = (70, 150, 310, 630, 65, 200, 605)  # the first steps of later periods of the configurations below
LARGE = (999, 1000, 4095, 12345, 2**24 - 1, 2**24, 2**24 + 1, 2**24 + 2, 2**31 - 1, 2**31, 2**31 + 1, 2**53 - 1)
STEPS = (*range(61), *(start + near for start in RESTARTS for near in (-1, 0, 1)), *LARGE)

# 0.7, 0.3 and the like are no float32: they show where Keras rounds to float32 on the way to float64
CONFIGS = [
    ("ExponentialDecay", {"decay_steps": 10, "decay_rate": 0.96}),
    ("ExponentialDecay", {"decay_steps": 7, "decay_rate": 0.5, "staircase": True}),
    ("ExponentialDecay", {"decay_steps": 12.7, "decay_rate": 1.01}),
    ("InverseTimeDecay", {"decay_steps": 10, "decay_rate": 0.5}),
    ("InverseTimeDecay", {"decay_steps": 7, "decay_rate": 0.3, "staircase": True}),
    ("InverseTimeDecay", {"decay_steps": 3.3, "decay_rate": 1.7}),
    ("InverseTimeDecay", {"decay_steps": 0, "decay_rate": 0.5}),
    ("PolynomialDecay", {"decay_steps": 30}),
    ("PolynomialDecay", {"decay_steps": 17, "end_learning_rate": 0.01, "cycle": True}),
    ("PolynomialDecay", {"decay_steps": 0.7, "end_learning_rate": 0.03, "cycle": True}),
    ("PolynomialDecay", {"decay_steps": 30, "end_learning_rate": 0.01, "power": 2.0}),
    ("PolynomialDecay", {"decay_steps": 50, "end_learning_rate": 0.03, "power": 0.5}),
    ("PolynomialDecay", {"decay_steps": 13, "end_learning_rate": 0.0, "power": 1.7, "cycle": True}),
    ("PolynomialDecay", {"decay_steps": -5, "cycle": True}),
    ("CosineDecay", {"decay_steps": 40}),
    ("CosineDecay", {"decay_steps": 40, "alpha": 0.1}),
    ("CosineDecay", {"decay_steps": 30, "alpha": 0.3, "warmup_target": 0.7, "warmup_steps": 10}),
    ("CosineDecay", {"decay_steps": 20, "warmup_target": 0.05, "warmup_steps": 0}),
    ("CosineDecay", {"decay_steps": 20, "warmup_steps": 10}),
    ("CosineDecay", {"decay_steps": 10**7, "alpha": 0.01, "warmup_target": 1.0, "warmup_steps": 50}),
    ("CosineDecayRestarts", {"first_decay_steps": 10}),
    ("CosineDecayRestarts", {"first_decay_steps": 10, "t_mul": 1.0, "alpha": 0.1}),
    ("CosineDecayRestarts", {"first_decay_steps": 8, "t_mul": 1.0, "m_mul": 0.8}),
    ("CosineDecayRestarts", {"first_decay_steps": 8, "t_mul": 1.5, "m_mul": 0.9, "alpha": 0.05}),
    ("CosineDecayRestarts", {"first_decay_steps": 5, "t_mul": 3.0, "m_mul": 1.1}),
    ("CosineDecayRestarts", {"first_decay_steps": 20, "t_mul": 0.7}),
    ("PiecewiseConstantDecay", {"boundaries": [10, 20, 55], "values": [0.1, 0.03, 0.01, 0.7]}),
    ("PiecewiseConstantDecay", {"boundaries": [5.7, 30.0], "values": [0.1, 0.03, 0.01]}),
    ("PiecewiseConstantDecay", {"boundaries": [2**24, 2**31 - 1], "values": [0.1, 0.03, 0.01]}),
]
INITIAL = 0.1


def main() -> None:
    about = json.dumps({"configs": CONFIGS, "steps": STEPS, "kinds": list(KINDS), "initial": INITIAL})
    recorded = {np.dtype(dtype).name: np.array([values(name, config, dtype) for name, config in CONFIGS]) for dtype in DTYPES}
    recorded["about"] = np.array(about)
    if "--check" not in sys.argv:
        np.savez_compressed(PATH, **recorded)
    with np.load(PATH) as file:
        if not all(np.array_equal(file[key], array, equal_nan=array.dtype.kind == "f") for key, array in recorded.items()):
            sys.exit(f"differs from the recorded file: {PATH.name}")
    print(f"{PATH.name}: {len(CONFIGS)} configurations, {PATH.stat().st_size} bytes")


def values(name: str, config: dict, dtype: type) -> np.ndarray:
    given = dict(config)
    if name == "PiecewiseConstantDecay":
        given["values"] = [dtype(value) for value in config["values"]]
    else:
        given["initial_learning_rate"] = dtype(INITIAL)
    schedule = getattr(tf.keras.optimizers.schedules, name)(**given)
    result = np.array(
        [[schedule(kind(step) if kind is int else tf.constant(kind(step))).numpy() for step in STEPS] for kind in KINDS.values()]
    )
    assert result.dtype == dtype, (name, config, result.dtype)
    return result


if __name__ == "__main__":
    main()
