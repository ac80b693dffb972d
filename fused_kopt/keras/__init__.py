"""Keras 3's optimizers on its torch backend, their steps in fused launches: `compile(optimizer=fused_kopt.keras.Adam(1e-3))`.

Each class is a subclass of the Keras class of its name, with its arguments, formulas, config, variables and files, and is
registered as `fused_kopt>Adam` and so on. Importing this package imports keras; ImportError unless its backend is torch.
"""

from fused_kopt.keras.adadelta import Adadelta
from fused_kopt.keras.adagrad import Adagrad
from fused_kopt.keras.adam import Adam, AdamW
from fused_kopt.keras.adamax import Adamax
from fused_kopt.keras.ftrl import Ftrl
from fused_kopt.keras.fusing import fuse
from fused_kopt.keras.lamb import Lamb
from fused_kopt.keras.lion import Lion
from fused_kopt.keras.logger import StatsLogger
from fused_kopt.keras.loss_scale import LossScaleOptimizer
from fused_kopt.keras.nadam import Nadam
from fused_kopt.keras.rmsprop import RMSprop
from fused_kopt.keras.sgd import SGD

__all__ = [
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Ftrl",
    "Lamb",
    "Lion",
    "LossScaleOptimizer",
    "Nadam",
    "RMSprop",
    "StatsLogger",
    "fuse",
]
