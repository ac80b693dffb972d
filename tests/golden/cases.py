"""The recorded runs: which optimizer, with which options, on which variables. Numpy only: TensorFlow and torch both import it."""

from dataclasses import replace
from typing import Any

from golden.draw import DENSE_SHAPES, LARGE_SHAPES, SMALL_SHAPES, SPARSE_SHAPES, WIDE_SHAPES, Case, late, now_and_then


def _schedule(name: str, config: dict[str, Any]) -> dict[str, Any]:
    return {"class_name": name, "config": config}


LR = "initial_learning_rate"
STAIRCASE = {LR: 0.3, "decay_steps": 7, "decay_rate": 0.8, "staircase": True}
POLYNOMIAL = {LR: 0.3, "decay_steps": 15, "end_learning_rate": 0.02, "power": 0.6, "cycle": True}
WARMUP = {LR: 0.01, "decay_steps": 30, "alpha": 0.1, "warmup_target": 0.2, "warmup_steps": 8}
# float32 pow, log and cos of the C library equal the rounded double functions at all 52 steps of these (of RESTARTS with 6, 2.0 not)
SCHEDULES = {
    "exponential": _schedule("ExponentialDecay", {LR: 0.3, "decay_steps": 7, "decay_rate": 0.8}),
    "staircase": _schedule("ExponentialDecay", STAIRCASE),
    "inverse": _schedule("InverseTimeDecay", {LR: 0.2, "decay_steps": 6, "decay_rate": 0.4}),
    "piecewise": _schedule("PiecewiseConstantDecay", {"boundaries": [3, 17, 40], "values": [0.3, 0.1, 0.07, 0.01]}),
    "linear": _schedule("PolynomialDecay", {LR: 0.3, "decay_steps": 40, "end_learning_rate": 0.02}),
    "polynomial": _schedule("PolynomialDecay", POLYNOMIAL),
    "cosine": _schedule("CosineDecay", {LR: 0.2, "decay_steps": 45}),
    "warmup": _schedule("CosineDecay", WARMUP),
    "restarts": _schedule("CosineDecayRestarts", {LR: 0.2, "first_decay_steps": 7, "t_mul": 1.5, "m_mul": 0.7, "alpha": 0.05}),
}

# Bounds, the next power of two above what was measured, where the formula does not determine the last bits.
NORM = 16  # the order of the sum behind a norm that is not exact
POWER = 16  # Eigen's vectorised pow is up to an ulp off the rounded double power
RSQRT = 8  # float32 only: packets of Eigen take the CPU's approximate reciprocal root and one Newton step; it differs between CPUs

CLIPS = (
    ("clipvalue", {"clipvalue": 0.3}, False, 0),
    ("clipnorm", {"clipnorm": 1.7}, True, 0),
    ("clipnorm_idle", {"clipnorm": 1e3}, False, 0),
    ("clipnorm_decades", {"clipnorm": 1.7}, False, NORM),
    ("global", {"global_clipnorm": 2.3}, True, 0),
    ("global_idle", {"global_clipnorm": 1e4}, False, 0),
    ("global_decades", {"global_clipnorm": 2.3}, False, NORM),
    ("stacked", {"clipvalue": 2.5, "clipnorm": 3.3}, True, 0),
    ("stacked_global", {"clipvalue": 1.5, "global_clipnorm": 3.3}, True, 0),
)
L1, L2, SHRINKAGE = (f"{kind}_regularization_strength" for kind in ("l1", "l2", "l2_shrinkage"))
FTRL = {"learning_rate": 0.2, "initial_accumulator_value": 0.3, L1: 0.2, L2: 0.1, SHRINKAGE: 0.05, "beta": 0.4, "decay": 0.01}

DENSE = (
    Case("sgd_default", "SGD", {}),
    Case("sgd_decay", "SGD", {"learning_rate": 0.3, "decay": 0.07}),
    Case("sgd_nesterov_without_momentum", "SGD", {"learning_rate": 0.1, "nesterov": True}),
    Case("sgd_momentum", "SGD", {"learning_rate": 0.1, "momentum": 0.9}),
    Case("sgd_momentum_late", "SGD", {"learning_rate": 0.05, "momentum": 0.7, "decay": 0.03}, absent=late),
    Case("sgd_momentum_large", "SGD", {"learning_rate": 0.02, "momentum": 0.95}, shapes=LARGE_SHAPES, snapshots=(1, 52)),
    Case("sgd_momentum_one", "SGD", {"momentum": 1.0}),
    Case("sgd_nesterov", "SGD", {"learning_rate": 0.07, "momentum": 0.85, "nesterov": True}),
    Case("sgd_nesterov_twice", "SGD", {"momentum": 0.6, "nesterov": True, "decay": 0.1}, absent=now_and_then, twice=(3, 0)),
    Case("sgd_global_late", "SGD", {"global_clipnorm": 2.3, "momentum": 0.8}, absent=late, twice=(1,), grid=True),
    Case("sgd_schedule_and_decay", "SGD", {"learning_rate": SCHEDULES["linear"], "decay": 0.05}),
    Case("rmsprop_default", "RMSprop", {}),
    Case("rmsprop", "RMSprop", {"learning_rate": 0.05, "rho": 0.7, "epsilon": 0.02}),
    Case("rmsprop_decay_late", "RMSprop", {"learning_rate": 0.03, "rho": 0.8, "decay": 0.04}, absent=late),
    Case("rmsprop_twice", "RMSprop", {"learning_rate": 0.03, "rho": 0.8}, absent=now_and_then, twice=(2,)),
    Case("rmsprop_momentum", "RMSprop", {"learning_rate": 0.02, "rho": 0.75, "momentum": 0.6, "epsilon": 0.01}),
    Case("rmsprop_momentum_late", "RMSprop", {"momentum": 0.9, "decay": 0.1}, absent=late, twice=(1,)),
    Case("rmsprop_centered", "RMSprop", {"learning_rate": 0.02, "rho": 0.85, "epsilon": 0.03, "centered": True}),
    Case("rmsprop_centered_gaps", "RMSprop", {"centered": True}, absent=now_and_then),
    Case("rmsprop_both", "RMSprop", {"rho": 0.65, "momentum": 0.8, "epsilon": 1e-3, "centered": True}),
    Case("rmsprop_both_gaps", "RMSprop", {"momentum": 0.3, "centered": True, "decay": 0.2}, absent=now_and_then),
    Case("rmsprop_clipvalue", "RMSprop", {"learning_rate": 0.02, "clipvalue": 0.05}),
    Case("adam_default", "Adam", {}),
    Case("adam", "Adam", {"learning_rate": 0.05, "beta_1": 0.8, "beta_2": 0.97, "epsilon": 0.1}),
    Case("adam_beta_zero", "Adam", {"learning_rate": 0.02, "beta_1": 0.0, "beta_2": 0.9}),
    Case("adam_decay", "Adam", {"learning_rate": 0.1, "beta_1": 0.7, "beta_2": 0.99, "decay": 0.06}),
    Case("adam_late", "Adam", {"learning_rate": 0.02}, absent=late),
    Case("adam_twice", "Adam", {"learning_rate": 0.03, "beta_2": 0.9}, absent=now_and_then, twice=(0, 3)),
    Case("adam_large", "Adam", {"learning_rate": 0.01, "beta_2": 0.98}, shapes=LARGE_SHAPES, snapshots=(1, 52)),
    Case("adam_amsgrad", "Adam", {"learning_rate": 0.03, "beta_1": 0.85, "beta_2": 0.8, "epsilon": 1e-3, "amsgrad": True}),
    Case("adam_amsgrad_late", "Adam", {"beta_2": 0.7, "decay": 0.3, "amsgrad": True}, absent=late),
    Case("adam_schedule_and_decay", "Adam", {"learning_rate": SCHEDULES["restarts"], "amsgrad": True, "decay": 0.05}),
    Case("adam_piecewise", "Adam", {"learning_rate": SCHEDULES["piecewise"], "beta_2": 0.95, "decay": 0.2}),
    Case("adam_warmup", "Adam", {"learning_rate": SCHEDULES["warmup"], "beta_1": 0.6}),
    Case("adadelta_default", "Adadelta", {}, shapes=SMALL_SHAPES),
    Case("adadelta", "Adadelta", {"learning_rate": 1.0, "rho": 0.8, "epsilon": 1e-3}, shapes=SMALL_SHAPES),
    Case("adadelta_late", "Adadelta", {"learning_rate": 0.7, "decay": 0.05}, shapes=SMALL_SHAPES, absent=late, twice=(3,)),
    Case("adadelta_packets", "Adadelta", {"learning_rate": 1.0, "rho": 0.6, "epsilon": 1e-3}, ulp=RSQRT),
    Case("adagrad_default", "Adagrad", {}),
    Case("adagrad", "Adagrad", {"learning_rate": 0.2, "initial_accumulator_value": 0.7, "epsilon": 0.05}),
    Case("adagrad_from_zero", "Adagrad", {"learning_rate": 0.1, "initial_accumulator_value": 0.0, "decay": 0.1}),
    Case("adagrad_late", "Adagrad", {"learning_rate": 0.5, "initial_accumulator_value": 0.01}, absent=late, twice=(0,)),
    Case("adamax_default", "Adamax", {}),
    Case("adamax", "Adamax", {"learning_rate": 0.03, "beta_1": 0.8, "beta_2": 0.9, "epsilon": 0.04}),
    Case("adamax_late", "Adamax", {"beta_1": 0.6, "beta_2": 0.98, "decay": 0.04}, absent=late, twice=(1,)),
    Case("nadam_default", "Nadam", {}),
    Case("nadam", "Nadam", {"learning_rate": 0.02, "beta_1": 0.8, "beta_2": 0.97, "epsilon": 0.02, "schedule_decay": 0.1}),
    Case("nadam_decay_ignored", "Nadam", {"learning_rate": 0.03, "beta_2": 0.9, "decay": 0.5}),
    Case("nadam_late", "Nadam", {"learning_rate": 0.01, "schedule_decay": 0.02}, absent=late, twice=(3, 1)),
    Case("nadam_clipvalue", "Nadam", {"clipvalue": 0.2, "beta_1": 0.7}, absent=now_and_then),
    Case("ftrl_default", "Ftrl", {}),
    Case("ftrl_l1", "Ftrl", {"learning_rate": 0.1, L1: 1.5}),
    Case("ftrl_l2", "Ftrl", {"learning_rate": 0.1, L2: 0.7, "initial_accumulator_value": 0.9}),
    Case("ftrl_shrinkage", "Ftrl", {"learning_rate": 0.1, SHRINKAGE: 0.3}),
    Case("ftrl_beta", "Ftrl", {"learning_rate": 0.3, "beta": 0.8, "decay": 0.02}),
    Case("ftrl_all", "Ftrl", FTRL),
    Case("ftrl_all_late", "Ftrl", FTRL, absent=late, twice=(2,)),
    Case("ftrl_from_zero", "Ftrl", {"learning_rate": 0.5, "initial_accumulator_value": 0.0, L1: 0.01}),
    Case("ftrl_power_zero", "Ftrl", FTRL | {"learning_rate_power": 0.0}),
    Case("ftrl_power_one", "Ftrl", FTRL | {"learning_rate_power": -1.0}),
    Case("ftrl_power", "Ftrl", FTRL | {"learning_rate_power": -0.7}, ulp=POWER),
    Case("ftrl_power_plain", "Ftrl", {"learning_rate": 0.4, "learning_rate_power": -0.3}, absent=now_and_then, ulp=POWER),
    Case("ftrl_clipvalue", "Ftrl", {"learning_rate": 0.2, "clipvalue": 0.5, L1: 0.1}),
    *(Case(f"sgd_{name}", "SGD", {"momentum": 0.9} | clip, grid=grid, ulp=ulp) for name, clip, grid, ulp in CLIPS),
    *(Case(f"adam_{name}", "Adam", {"epsilon": 1e-3} | clip, grid=grid, ulp=ulp) for name, clip, grid, ulp in CLIPS),
    *(Case(f"sgd_{name}", "SGD", {"learning_rate": schedule, "momentum": 0.5}) for name, schedule in SCHEDULES.items()),
)

SPARSE = (
    Case("sgd_sparse_unique", "SGD", {"learning_rate": 0.1, "decay": 0.02}, duplicates=False),
    Case("sgd_sparse", "SGD", {"learning_rate": 0.1}),
    Case("sgd_sparse_momentum", "SGD", {"learning_rate": 0.1, "momentum": 0.9}),
    Case("sgd_sparse_nesterov", "SGD", {"learning_rate": 0.05, "momentum": 0.8, "nesterov": True}, absent=late),
    Case("sgd_sparse_clipnorm", "SGD", {"learning_rate": 0.1, "momentum": 0.8, "clipnorm": 1.3}, grid=True),
    Case("sgd_sparse_global", "SGD", {"momentum": 0.8, "global_clipnorm": 2.1, "clipvalue": 2.0}, grid=True),
    Case("rmsprop_sparse", "RMSprop", {"learning_rate": 0.02, "rho": 0.7, "epsilon": 0.01}),
    Case("rmsprop_sparse_momentum", "RMSprop", {"rho": 0.8, "momentum": 0.7, "decay": 0.05}, absent=now_and_then),
    Case("rmsprop_sparse_packets", "RMSprop", {"rho": 0.8, "momentum": 0.7}, shapes=WIDE_SHAPES, ulp=RSQRT),
    Case("rmsprop_sparse_centered", "RMSprop", {"learning_rate": 0.02, "rho": 0.8, "epsilon": 1e-3, "centered": True}),
    Case("rmsprop_sparse_both", "RMSprop", {"rho": 0.9, "momentum": 0.7, "epsilon": 1e-3, "centered": True}),
    Case("adam_sparse_default", "Adam", {}),
    Case("adam_sparse", "Adam", {"learning_rate": 0.03, "beta_1": 0.8, "beta_2": 0.97, "epsilon": 0.01}, absent=late),
    Case("adam_sparse_amsgrad", "Adam", {"beta_1": 0.7, "beta_2": 0.8, "amsgrad": True, "decay": 0.05}),
    Case("adam_sparse_clipvalue", "Adam", {"clipvalue": 0.1, "learning_rate": 0.02}, shapes=WIDE_SHAPES),
    Case("adadelta_sparse", "Adadelta", {"learning_rate": 0.9, "rho": 0.8, "epsilon": 1e-3}, absent=now_and_then),
    Case("adagrad_sparse", "Adagrad", {"learning_rate": 0.2, "initial_accumulator_value": 0.4, "epsilon": 0.02}),
    Case("adamax_sparse", "Adamax", {"learning_rate": 0.02, "beta_1": 0.8, "beta_2": 0.97, "epsilon": 0.01}),
    Case("nadam_sparse_default", "Nadam", {}),
    Case("nadam_sparse", "Nadam", {"learning_rate": 0.02, "beta_2": 0.9, "schedule_decay": 0.05}, absent=late),
    Case("ftrl_sparse_default", "Ftrl", {}),
    Case("ftrl_sparse_all", "Ftrl", FTRL),
    Case("ftrl_sparse_l1", "Ftrl", {"learning_rate": 0.1, L1: 0.9}, absent=now_and_then),
    Case("ftrl_sparse_power", "Ftrl", FTRL | {"learning_rate_power": -0.7}, ulp=POWER),
)

MIXED = (
    Case("sgd_mixed", "SGD", {"momentum": 0.9}),
    Case("adam_mixed", "Adam", {"learning_rate": 0.02, "beta_2": 0.9, "decay": 0.1}, absent=now_and_then),
    Case("nadam_mixed", "Nadam", {"learning_rate": 0.02, "schedule_decay": 0.05}, absent=late),
    Case("ftrl_mixed", "Ftrl", FTRL),
)


def _with_dtype(case: Case, dtype: str) -> Case:
    exact = dtype == "float64" and case.name.endswith("packets")
    shapes = SPARSE_SHAPES if case in SPARSE and case.shapes == DENSE_SHAPES else case.shapes
    return replace(case, name=f"{case.name}-{dtype}", dtype=dtype, shapes=shapes, sparse=case in SPARSE, ulp=0 if exact else case.ulp)


CASES = tuple(_with_dtype(case, dtype) for case in DENSE + SPARSE for dtype in ("float32", "float64"))
CASES += tuple(_with_dtype(case, "mixed") for case in MIXED)
