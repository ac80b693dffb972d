"""Keras optimizers for PyTorch tensors: bit for bit TensorFlow's results, fused into one Triton launch.

Modules to import by themselves: `fused_kopt.torch_optim`, the optimizers as subclasses of torch.optim.Optimizer; `fused_kopt.checkpoint`.
"""

from fused_kopt import errors, mixed_precision, optimizers
from fused_kopt.errors import FusedMismatchError, StaleVariableError, TornStepError
from fused_kopt.execute import stats
from fused_kopt.memory import estimate_memory
from fused_kopt.optimizers import SGD, Adadelta, Adagrad, Adam, Adamax, Ftrl, Lion, Nadam, RMSprop
from fused_kopt.precision import Precision
from fused_kopt.tape import GradientTape
from fused_kopt.verification import verify

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "Adamax",
    "Ftrl",
    "FusedMismatchError",
    "GradientTape",
    "Lion",
    "Nadam",
    "Precision",
    "RMSprop",
    "StaleVariableError",
    "TornStepError",
    "errors",
    "estimate_memory",
    "mixed_precision",
    "optimizers",
    "stats",
    "verify",
]
