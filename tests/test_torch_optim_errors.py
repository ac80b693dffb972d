"""What torch_optim refuses, one row per raise: the message names the value or the parameter, and nothing has changed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import assert_same
from torch_classes import give, parameters, snapshot, steps

from fused_kopt import torch_optim
from fused_kopt.torch_optim import SGD, Adadelta, Adagrad, Adam, AdamW, Ftrl, Lion, Nadam, RMSprop


def one(dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=dtype.is_floating_point or dtype.is_complex)


TWICE = one()
CONSTRUCTION: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "lr": (lambda: Adam([one()], lr=-1.0), ValueError, r"`lr` must be in \[0.0, inf\). Received: lr=-1.0"),
    "learning_rate": (lambda: Adam([one()], learning_rate=float("nan")), ValueError, r"`lr` must be in .* Received: lr=nan"),
    "text": (lambda: Adam([one()], lr="fast"), TypeError, "`lr` must be a number or a 0-d tensor. Received: lr='fast'"),
    "vector": (lambda: Adam([one()], lr=torch.ones(2)), ValueError, r"`lr` as a tensor must be 0-d .* shape \(2,\)"),
    "betas": (lambda: Adam([one()], betas=(0.9, 1.0)), ValueError, r"`beta_2` must be in \[0.0, 1.0\). Received: beta_2=1.0"),
    "three betas": (lambda: Adam([one()], betas=(0.9, 0.9, 0.9)), ValueError, "`betas` must be two numbers"),
    "eps": (lambda: Adam([one()], eps=-1e-8), ValueError, "`eps` must be in"),
    "momentum": (lambda: SGD([one()], momentum=1.5), ValueError, r"`momentum` must be in \[0.0, 1.0\]. Received: momentum=1.5"),
    "weight_decay": (lambda: AdamW([one()], weight_decay=-0.1), ValueError, "`weight_decay` must be in"),
    "power": (lambda: Ftrl([one()], learning_rate_power=0.5), ValueError, r"`learning_rate_power` must be in \[-inf, 0.0\]"),
    "both": (lambda: Adam([one()], lr=1e-3, learning_rate=1e-3), TypeError, "`learning_rate` and `lr` are the same value"),
    "both betas": (lambda: Adam([one()], betas=(0.9, 0.999), beta_2=0.9), TypeError, "`beta_2` and `betas` are the same value"),
    "both eps": (lambda: RMSprop([one()], eps=1e-7, epsilon=1e-7), TypeError, "`epsilon` and `eps` are the same value"),
    "both alphas": (lambda: RMSprop([one()], alpha=0.9, rho=0.9), TypeError, "`rho` and `alpha` are the same value"),
    "both decays": (lambda: Nadam([one()], momentum_decay=0.1, schedule_decay=0.1), TypeError, "`schedule_decay` and `momentum_decay`"),
    "not its word": (lambda: SGD([one()], beta_1=0.9), TypeError, "SGD has no `beta_1`. It has lr, momentum, weight_decay, nesterov"),
    "no epsilon": (lambda: Lion([one()], epsilon=0.9), TypeError, "Lion has no `epsilon`"),
    "unknown": (lambda: Adam([one()], etas=1), TypeError, "Adam got an unexpected keyword argument 'etas'. Allowed besides its own"),
    "maximize": (lambda: Adam([one()], maximize=True), ValueError, "Adam does not support maximize=True. Minimize the negative loss"),
    "dampening": (lambda: SGD([one()], dampening=0.1), ValueError, "SGD does not support dampening=0.1"),
    "capturable": (lambda: Adam([one()], capturable=True), ValueError, r"capturable=True. .*prepare_replays"),
    "differentiable": (lambda: Adam([one()], differentiable=True), ValueError, "differentiable=True. No gradient"),
    "clipnorm": (lambda: Adam([one()], clipnorm=-1.0), ValueError, "`clipnorm` must be a number >= 0 or None. Received: clipnorm=-1.0"),
    "two norms": (lambda: Adam([one()], clipnorm=1.0, global_clipnorm=1.0), ValueError, "exclude each other"),
    "executor": (lambda: Adam([one()], executor="gpu"), ValueError, "`executor` must be one of"),  # type: ignore[arg-type]
    "amp": (lambda: Adam([one()], amp="on"), ValueError, "`amp` must be None or 'fused'"),  # type: ignore[arg-type]
    "empty": (lambda: Adam([]), ValueError, "empty parameter list"),
    "integers": (lambda: Adam([one(torch.complex64)]), TypeError, r"parameter 0 of group 0 must be floating point .*complex64"),
    "twice": (lambda: Adam([TWICE, one(), TWICE]), ValueError, "parameter 2 of group 0 is parameter 0 of group 0 once more"),
    "named twice": (lambda: Adam([("a", TWICE), ("b", TWICE)]), ValueError, "parameter 'b' of group 0 is parameter 'a' of group 0"),
    "in two groups": (lambda: Adam([{"params": [TWICE]}, {"params": [TWICE]}]), ValueError, "more than one parameter group"),
    "group": (lambda: Adam([{"params": [one()], "lr": -1.0}]), ValueError, "`lr` must be in"),
    "group's words": (lambda: Adam([{"params": [one()], "lr": 1.0, "learning_rate": 1.0}]), TypeError, "are the same value"),
    "group's maximize": (lambda: Adam([{"params": [one()], "maximize": True}]), ValueError, "maximize=True"),
    "no group": (lambda: Adam([one()]).add_param_group([one()]), TypeError, "A parameter group must be a dict. Received: list"),  # type: ignore[arg-type]
    "executor later": (lambda: setattr(Adam([one()]), "executor", "gpu"), ValueError, "`executor` must be one of"),
}  # fmt: skip


@pytest.mark.parametrize("row", CONSTRUCTION)
def test_construction(row: str) -> None:
    make, error, message = CONSTRUCTION[row]
    with pytest.raises(error, match=message):
        make()


def test_keras_words() -> None:
    params = parameters()
    spelled = Adam([{"params": params, "beta_1": 0.5, "learning_rate": 0.25}], epsilon=None, beta_2=0.75, learning_rate=1)
    group = spelled.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (0.25, (0.5, 0.75), 1e-7)
    assert spelled.defaults["betas"] == (0.9, 0.75)
    assert RMSprop(params, rho=0.5).param_groups[0]["alpha"] == 0.5
    assert Adadelta(params, rho=0.5).param_groups[0]["rho"] == 0.5
    assert Adagrad(params, decay=0.5).param_groups[0]["lr_decay"] == 0.5
    assert Nadam(params, schedule_decay=0.5).param_groups[0]["momentum_decay"] == 0.5
    assert SGD(params, np.float32(0.5), 0.9, 0, 1e-4, True).param_groups[0]["nesterov"] is True
    assert not {"learning_rate", "foreach", "fused", "clipvalue"} & set(SGD(params, foreach=True, fused=False).param_groups[0])


def test_groups_of_generators_and_of_one_tensor() -> None:
    params = parameters()
    optimizer = Adam([{"params": (p for p in params[:2])}, {"params": params[2]}])
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 1]
    with pytest.raises(TypeError, match="ordered collections"):
        Adam([{"params": set(params)}])


def sparse(optimizer: Any, params: Any) -> None:
    params[4].grad = params[4].grad.to_sparse(1)


def wrong_rate(optimizer: Any, params: Any) -> None:
    optimizer.param_groups[1]["lr"] = "fast"


def freed(optimizer: Any, params: Any) -> None:
    params[4].grad.untyped_storage().resize_(0)


def meta(optimizer: Any, params: Any) -> None:
    optimizer.state[params[4]]["exp_avg"] = optimizer.state[params[4]]["exp_avg"].to("meta")


def other_shape(optimizer: Any, params: Any) -> None:
    optimizer.state[params[4]]["exp_avg"] = torch.zeros(2)


def other_dtype(optimizer: Any, params: Any) -> None:
    optimizer.state[params[4]]["exp_avg"] = optimizer.state[params[4]]["exp_avg"].double()


def bad_limit(optimizer: Any, params: Any) -> None:
    optimizer.clipvalue = "tight"


def two_norms(optimizer: Any, params: Any) -> None:
    optimizer.clipnorm = optimizer.global_clipnorm = 1.0


def norms_of_two_rules(optimizer: Any, params: Any) -> None:
    optimizer.global_clipnorm = 1.0
    optimizer.param_groups[1]["amsgrad"] = True


STEPS: dict[Callable[[Any, Any], None], tuple[type[Exception], str]] = {
    sparse: (TypeError, r"gradient of parameter 'body\.4' \(4, 3, 5\) is sparse.*sparse=False"),
    wrong_rate: (TypeError, "must be.* a real number.*'fast'"),
    freed: (ValueError, r"gradient of parameter 'body\.4' .*outgrows its storage"),
    meta: (TypeError, r"slot of parameter 'body\.4'.*meta"),
    other_shape: (ValueError, r"parameter 'body\.4' .*has a slot of shape \(2,\)"),
    other_dtype: (TypeError, r"parameter 'body\.4' .*has a slot of torch.float64"),
    bad_limit: (TypeError, "`clipvalue` must be a number >= 0 or None. Received: clipvalue='tight'"),
    two_norms: (ValueError, "`clipnorm` and `global_clipnorm` exclude each other"),
    norms_of_two_rules: (ValueError, "`global_clipnorm` needs one rule for all groups, .*these have .*adam.*amsgrad"),
}


@pytest.mark.parametrize("amsgrad", [False, True], ids=["one rule", "two rules"])
@pytest.mark.parametrize("damage", STEPS)
def test_a_bad_step_changes_nothing(damage: Any, amsgrad: bool) -> None:
    """Also where the first of two launches would have been fine."""
    params = parameters()
    named = [(f"body.{i}", p) for i, p in enumerate(params)]
    optimizer = Adam([{"params": named[:3]}, {"params": named[3:], "amsgrad": amsgrad}])
    steps(optimizer, params, range(3))
    give(params, 4)
    damage(optimizer, params)
    whole = {p: dict(optimizer.state[p]) for p in params[:3]}
    before = snapshot(optimizer, params[:3])
    error, message = STEPS[damage]
    with pytest.raises(error, match=message):
        optimizer.step()
    assert_same(snapshot(optimizer, params[:3]), before)
    assert all(optimizer.state[p].keys() == whole[p].keys() for p in params[:3])


def test_ftrl_needs_a_rate() -> None:
    params = parameters()
    optimizer = Ftrl(params, lr=0.0)
    give(params, 0)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="Ftrl divides by the learning rate, which must be > 0"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_a_first_step_that_fails_makes_no_state() -> None:
    params = parameters()
    optimizer = Adam(params)
    give(params, 0)
    params[4].grad = params[4].grad.to_sparse(1)
    with pytest.raises(TypeError, match="is sparse"):
        optimizer.step()
    assert not optimizer.state


def test_a_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    optimizer = Adam(params)
    give(params, 0)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"CUDA graph .*prepare_replays"):
        optimizer.step()


def state_of(cls: str = "Adam", **keywords: Any) -> Any:
    params = parameters()
    optimizer = getattr(torch.optim if keywords.pop("theirs", False) else torch_optim, cls)(params, **keywords)
    steps(optimizer, params, [0])
    return optimizer.state_dict()


def changed(key: str, value: Any) -> Any:
    state = state_of()
    state["state"][4][key] = value
    return state


LOADS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "groups": (lambda: Adam([{"params": [one()]}, {"params": [one()]}]).state_dict(), ValueError, r"groups of \[1, 1\] .* of \[5\]"),
    "another class": (lambda: state_of("RMSprop"), ValueError, r"state of parameter 0 .* has \['square_avg', 'step'\]; Adam keeps"),
    "Adamax": (lambda: state_of("Adamax"), ValueError, "'exp_inf'"),
    "shape": (lambda: changed("exp_avg", torch.zeros(4, 3)), ValueError, r"'exp_avg' of parameter 4 .* shape \(4, 3\)"),
    "integers": (lambda: changed("exp_avg", torch.zeros(4, 3, 5, dtype=torch.int8)), ValueError, "floating tensor .*int8"),
    "no tensor": (lambda: changed("exp_avg", [1.0]), ValueError, "Received: list"),
    "strange": (lambda: changed("qmap", torch.zeros(3)), ValueError, r"'qmap'.*Is it another optimizer's"),
    "maximize": (lambda: state_of(theirs=True, maximize=True), ValueError, "maximize=True"),
    "nobody's": (lambda: {**state_of(), "state": {"__flat__": {}}}, ValueError, "in none of its groups"),
}


@pytest.mark.parametrize("row", LOADS)
def test_loading(row: str) -> None:
    make, error, message = LOADS[row]
    params = parameters()
    optimizer = Adam(params, lr=0.5)
    steps(optimizer, params, [1])
    before, given = snapshot(optimizer, params), make()
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(given)
    assert_same(snapshot(optimizer, params), before)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_slot_that_is_missing() -> None:
    state = state_of()
    del state["state"][4]["exp_avg_sq"]
    with pytest.raises(ValueError, match=r"parameter 4 .* has \['exp_avg', 'step'\]; Adam keeps \['exp_avg', 'exp_avg_sq', 'step'\]"):
        Adam(parameters()).load_state_dict(state)
