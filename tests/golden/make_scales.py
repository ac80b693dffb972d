"""Record what tf.keras.mixed_precision.LossScaleOptimizer does: `cd tests; python -m golden.make_scales [--check]` where tensorflow-cpu
2.15.1 is installed.

`scales.npz` holds the cases as JSON (see golden.scales) and for each case, by its position, `scale` float32 [steps], `counter` int64
[steps] (-1: there is none), `iterations` int64 [steps], the variable after every step float32 [steps, SIZE], and the optimizer's
weights at the end, one array. `--check` writes nothing and fails if the file differs.
"""

import json
import os
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
import tensorflow as tf
from golden.scales import CASES, PATH, SIZE, gradient


def recorded(name: str, options: dict, scaling: dict, steps: str) -> dict[str, np.ndarray]:
    """One case."""
    inner = getattr(tf.keras.optimizers.legacy, name)(**options)
    optimizer = tf.keras.mixed_precision.LossScaleOptimizer(inner, **scaling)
    variable = tf.Variable(np.linspace(-1, 1, SIZE, dtype=np.float32))
    rows = []
    for step, kind in enumerate(steps):
        scaled = [optimizer.get_scaled_loss(tf.constant(1.0)) * gradient(step, kind)]
        (unscaled,) = optimizer.get_unscaled_gradients(scaled)
        optimizer.apply_gradients([] if kind == "e" else [(unscaled, variable)])
        counter = -1 if optimizer.dynamic_counter is None else optimizer.dynamic_counter.numpy()
        rows.append((optimizer.loss_scale.numpy(), counter, optimizer.iterations.numpy(), variable.numpy()))
    columns = dict(zip(("scale", "counter", "iterations", "variable"), map(np.array, zip(*rows, strict=True)), strict=True))
    return columns | {"weights": np.concatenate([np.ravel(w).astype(np.float32) for w in optimizer.get_weights()])}


def main() -> None:
    """Record, or compare."""
    found = {f"{i}/{key}": value for i, case in enumerate(CASES) for key, value in recorded(*case).items()}
    found |= {"cases": np.array(json.dumps(CASES)), "tensorflow": np.array(tf.__version__)}
    if "--check" not in sys.argv:
        np.savez_compressed(PATH, **found)
        return
    with np.load(PATH) as old:
        differ = [key for key in sorted({*found, *old}) if key not in found or key not in old or not np.array_equal(found[key], old[key])]
    if differ:
        sys.exit(f"differs from what this machine computes: {differ}")


if __name__ == "__main__":
    main()
