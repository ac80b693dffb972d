"""The optimizers as subclasses of torch.optim.Optimizer: its contract, Keras's numerics, one launch for all parameter groups."""

from fused_kopt.torch_optim.adadelta import Adadelta
from fused_kopt.torch_optim.adagrad import Adagrad
from fused_kopt.torch_optim.adam import Adam, AdamW
from fused_kopt.torch_optim.adamax import Adamax
from fused_kopt.torch_optim.ftrl import Ftrl
from fused_kopt.torch_optim.lion import Lion
from fused_kopt.torch_optim.nadam import Nadam
from fused_kopt.torch_optim.optimizer import Optimizer
from fused_kopt.torch_optim.rmsprop import RMSprop
from fused_kopt.torch_optim.sgd import SGD

__all__ = ["SGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "Ftrl", "Lion", "Nadam", "Optimizer", "RMSprop"]
