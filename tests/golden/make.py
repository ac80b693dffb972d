"""Record what tf.keras.optimizers.legacy computes: `/work/env/tf/bin/python tests/golden/make.py [--check]`, TensorFlow 2.15 needed.

`--check` writes nothing and fails if a recorded file differs from what this machine computes.
"""

import argparse
import json
import os
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
import tensorflow as tf
from cases import CASES, Case, Slices, checksum, initial, path, steps

tf.config.threading.set_inter_op_parallelism_threads(1)  # the order of a sum, hence a norm, depends on the threads
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.get_logger().setLevel("ERROR")  # one warning per call with an absent gradient

SMALLEST = 1e-12  # TensorFlow flushes subnormal results to zero; squares of gradients must stay far from them


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--check", action="store_true")
    check = arguments.parse_args().check
    print_census()
    differing = [name for name in sorted({case.optimizer for case in CASES}) if not record(name, check)]
    if differing:
        sys.exit(f"differs from the recorded file: {', '.join(differing)}")


def record(optimizer: str, check: bool) -> bool:
    arrays = {}
    for case in CASES:
        if case.optimizer == optimizer:
            assert_powers_agree(case)
            arrays |= {f"{case.name}/{key}": np.asarray(value) for key, value in run(case).items()}
    packed = pack(arrays)
    if not check:
        np.savez_compressed(path(optimizer), **packed)
        print(f"{path(optimizer).name}: {len(arrays)} arrays, {path(optimizer).stat().st_size} bytes")
    with np.load(path(optimizer)) as file:
        return set(file.files) == set(packed) and all(np.array_equal(file[name], packed[name]) for name in packed)


def run(case: Case) -> dict[str, np.ndarray]:
    variables = [tf.Variable(value) for value in initial(case)]
    optimizer = build(case)
    recorded = {"inputs": np.int64(checksum(case))}
    for step, pairs in enumerate(steps(case), start=1):
        optimizer.apply_gradients([(gradient_tensor(case, gradient), variables[index]) for gradient, index in pairs])
        if step in case.snapshots:
            recorded |= {f"variable/{step}/{index}": variable.numpy() for index, variable in enumerate(variables)}
    recorded |= {f"weight/{position}": value for position, value in enumerate(optimizer.get_weights())}
    for key, value in recorded.items():
        assert_ordinary(f"{case.name}/{key}", value)
    return recorded


def build(case: Case) -> tf.keras.optimizers.legacy.Optimizer:
    config = dict(case.config)
    if isinstance(config.get("learning_rate"), dict):
        config["learning_rate"] = tf.keras.optimizers.schedules.deserialize(config["learning_rate"])
    return getattr(tf.keras.optimizers.legacy, case.optimizer)(**config)


def gradient_tensor(case: Case, gradient) -> tf.Tensor | tf.IndexedSlices | None:
    if gradient is None:
        return None
    values = gradient.values if isinstance(gradient, Slices) else gradient
    assert np.all((values == 0) | (np.abs(values) > SMALLEST)), f"{case.name}: a gradient close to the subnormals"
    if isinstance(gradient, Slices):
        return tf.IndexedSlices(tf.constant(values), tf.constant(gradient.indices), tf.constant(gradient.shape, tf.int64))
    return tf.constant(gradient)


def assert_ordinary(key: str, value: np.ndarray) -> None:
    assert np.all(np.isfinite(value)), f"{key}: not finite"
    if value.dtype.kind == "f":
        assert np.all((value == 0) | (np.abs(value) >= np.finfo(value.dtype).tiny)), f"{key}: subnormal"


def pack(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One pool per dtype and the table of contents that `cases.load` reads."""
    pools, contents = {}, []
    for key, value in arrays.items():
        pool = pools.setdefault(value.dtype.name, [])
        contents.append((key, value.dtype.name, sum(part.size for part in pool), value.shape))
        pool.append(value.ravel())
    packed = {name: np.concatenate(pool) for name, pool in pools.items()}
    return packed | {"contents": np.array(json.dumps(contents)), "tensorflow": np.array(tf.__version__)}


def assert_powers_agree(case: Case) -> None:
    """The library rounds a double power to float32; TensorFlow's own float32 pow is an ulp off now and then.

    One such ulp shows in every element, so the cases keep to hyperparameters for which the two agree at every step.
    """
    for base, exponent in powers(case):
        for dtype in (np.float32, np.float64):
            expected, got = rounded_power(base, exponent(dtype), dtype), tensorflow_power(base, exponent(dtype), dtype)
            assert expected == got, f"{case.name}: {base} ** {exponent(dtype)} in {dtype.__name__} is {got!r}, not {expected!r}"


def powers(case: Case):
    """(base, exponent as a function of the dtype) of every power that the update takes."""
    betas = {"Adam": ("beta_1", "beta_2"), "Adamax": ("beta_1",), "Nadam": ("beta_2",)}.get(case.optimizer, ())
    defaults = {"beta_1": 0.9, "beta_2": 0.999}
    for beta in betas:
        for step in range(1, case.steps + 1):
            yield case.config.get(beta, defaults[beta]), lambda dtype, step=step: dtype(step)
    if case.optimizer == "Nadam":
        decay = case.config.get("schedule_decay", 0.004)
        for step in range(1, case.steps + 2):
            yield 0.96, lambda dtype, step=step: dtype(decay) * dtype(step)


def rounded_power(base: float, exponent: float, dtype: type) -> float:
    return dtype(float(np.float32(base)) ** float(exponent))


def tensorflow_power(base: float, exponent: float, dtype: type) -> float:
    return tf.pow(tf.constant(np.float32(base), dtype), tf.constant(exponent, dtype)).numpy()


def print_census() -> None:
    """How often the two powers disagree in general."""
    pairs = [(base / 200, np.float32(step)) for base in range(100, 200) for step in range(1, 61)]
    wrong = [pair for pair in pairs if rounded_power(*pair, np.float32) != tensorflow_power(*pair, np.float32)]
    print(f"float32 pow of TensorFlow {tf.__version__} is not the rounded double power in {len(wrong)} of {len(pairs)} (beta, step) pairs:")
    print(", ".join(f"{base}**{step:.0f}" for base, step in wrong))


if __name__ == "__main__":
    main()
