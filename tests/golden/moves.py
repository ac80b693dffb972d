"""Runs that move from TensorFlow to fused_kopt mid-way. Numpy only: TensorFlow and torch both import it."""

from golden.draw import FOLDER, SMALL_SHAPES, Case

HALF, WHOLE = 9, 20  # the step after which a run moves, and its last one
FILES = FOLDER / "moves"
LISTS = FOLDER / "moves.npz"
# The variables of the Keras model behind the .h5 files, in `trainable_variables` order.
VARIABLES = {"first/kernel": (4, 3), "first/bias": (3,), "second/kernel": (3, 2), "second/bias": (2,)}
DECAYING = {"class_name": "ExponentialDecay", "config": {"initial_learning_rate": 0.3, "decay_steps": 7, "decay_rate": 0.8}}

_CONFIGS = (
    ("adam", "Adam", {"learning_rate": 0.02, "decay": 0.03}),
    ("adam_amsgrad", "Adam", {"learning_rate": DECAYING, "amsgrad": True, "beta_2": 0.97}),
    ("sgd_momentum", "SGD", {"learning_rate": 0.05, "momentum": 0.9, "nesterov": True}),
    ("rmsprop", "RMSprop", {"learning_rate": 0.01, "rho": 0.8}),
    ("rmsprop_both", "RMSprop", {"momentum": 0.7, "centered": True, "epsilon": 1e-3}),
    ("nadam", "Nadam", {"learning_rate": 0.02, "beta_1": 0.8}),
    ("ftrl", "Ftrl", {"learning_rate": 0.2, "l1_regularization_strength": 0.02, "beta": 0.1}),
    ("adagrad", "Adagrad", {"learning_rate": 0.1}),
    ("adadelta", "Adadelta", {"learning_rate": 0.7}),
    ("adamax", "Adamax", {"learning_rate": 0.02}),
)
# Adadelta's reciprocal root is exact below the 8 lanes of Eigen's packet, see cases.py.
LISTED = tuple(
    Case(f"move_{name}", cls, config, **({"shapes": SMALL_SHAPES} if cls == "Adadelta" else {}), steps=WHOLE, snapshots=(HALF, WHOLE))
    for name, cls, config in _CONFIGS
)
FILED = tuple(
    Case(f"move_h5_{name}", cls, config, shapes=tuple(VARIABLES.values()), steps=WHOLE, snapshots=(HALF, WHOLE))
    for name, cls, config in _CONFIGS
    if name in ("adam", "adam_amsgrad", "sgd_momentum", "rmsprop", "nadam", "ftrl")
)
