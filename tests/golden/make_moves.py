"""Record TensorFlow runs that move mid-way: `cd tests; python -m golden.make_moves` where tensorflow-cpu 2.15.1 is installed.

moves.npz: variables and `get_weights()` after steps HALF and WHOLE. moves/*.h5: models saved by Keras after step HALF.
"""

import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
import tensorflow as tf
from golden.draw import Case, initial, steps
from golden.make import assert_ordinary, build
from golden.moves import FILED, FILES, HALF, LISTED, LISTS, VARIABLES, WHOLE

tf.get_logger().setLevel("ERROR")


def main() -> None:
    FILES.mkdir(exist_ok=True)
    recorded = {}
    for case in LISTED:
        variables = [tf.Variable(value) for value in initial(case)]
        recorded |= train(case, build(case), variables)
    for case in FILED:
        tf.keras.backend.clear_session()
        model = tf.keras.Sequential([tf.keras.layers.Dense(3, name="first"), tf.keras.layers.Dense(2, name="second")])
        model.build((None, 4))
        assert [v.name for v in model.trainable_variables] == [f"{name}:0" for name in VARIABLES]
        model.set_weights(initial(case))
        model.compile(optimizer=build(case), loss="mse")
        recorded |= train(case, model.optimizer, model.trainable_variables, model)
    np.savez_compressed(LISTS, **recorded)
    print(f"{LISTS.name}: {LISTS.stat().st_size} bytes")


def train(case: Case, optimizer, variables, model=None) -> dict[str, np.ndarray]:
    found = {}
    for step, pairs in enumerate(steps(case), start=1):
        optimizer.apply_gradients([(tf.constant(gradient), variables[index]) for gradient, index in pairs])
        if step in (HALF, WHOLE):
            found |= {f"{case.name}/variable/{step}/{i}": variable.numpy() for i, variable in enumerate(variables)}
            found |= {f"{case.name}/weight/{step}/{i}": np.asarray(value) for i, value in enumerate(optimizer.get_weights())}
        if step == HALF and model is not None:
            model.save(FILES / f"{case.name}.h5", save_format="h5")
    for key, value in found.items():
        assert_ordinary(key, value)
    return found


if __name__ == "__main__":
    main()
