"""The optimizers, their registry and the learning-rate schedules."""

from fused_kopt.optimizer import Optimizer
from fused_kopt.optimizers import schedules
from fused_kopt.optimizers.adadelta import Adadelta
from fused_kopt.optimizers.adagrad import Adagrad
from fused_kopt.optimizers.adam import Adam
from fused_kopt.optimizers.adamax import Adamax
from fused_kopt.optimizers.ftrl import Ftrl
from fused_kopt.optimizers.lion import Lion
from fused_kopt.optimizers.nadam import Nadam
from fused_kopt.optimizers.registry import deserialize, get, register, serialize
from fused_kopt.optimizers.rmsprop import RMSprop
from fused_kopt.optimizers.sgd import SGD

for _cls in (SGD, RMSprop, Adam, Adadelta, Adagrad, Adamax, Nadam, Ftrl, Lion):
    register(_cls)

__all__ = [
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "Adamax",
    "Ftrl",
    "Lion",
    "Nadam",
    "Optimizer",
    "RMSprop",
    "deserialize",
    "get",
    "register",
    "schedules",
    "serialize",
]
