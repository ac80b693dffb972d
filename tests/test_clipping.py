"""Gradient clipping (keras-semantics 5.2) against numpy in float64, and its special cases to the bit.

With SGD, learning rate 1 and variables of 0, a step leaves minus the clipped gradient in the variable.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support import EXECUTORS, assert_same, bits, randn, state
from test_config import every_class, make
from torch import Tensor

from fused_kopt import SGD
from fused_kopt.optimizer import Optimizer

CLIPS = ("clipvalue", "clipnorm", "global_clipnorm")
INF, NAN = math.inf, math.nan
every_executor = pytest.mark.parametrize("executor", EXECUTORS)
# Roundings on the way: product, quotient, two of the norm, scale and its two quotients, store: 8 of half an ulp each.
ULPS = 4


def clipvalue(gradients: Sequence[np.ndarray], c: float) -> list[np.ndarray]:
    return [np.clip(g, -c, c) for g in gradients]


def clipnorm(gradients: Sequence[np.ndarray], c: float) -> list[np.ndarray]:
    return [g * c / max(np.sqrt(np.sum(g * g)), c) for g in gradients]


def global_clipnorm(gradients: Sequence[np.ndarray], c: float) -> list[np.ndarray]:
    norm = np.sqrt(sum(np.sum(g * g) for g in gradients))
    return [g * c * min(1 / norm, 1 / c) for g in gradients]


STAGES = {"clipvalue": clipvalue, "clipnorm": clipnorm, "global_clipnorm": global_clipnorm}


def oracle(gradients: Sequence[Tensor], clips: dict[str, float], order: Sequence[str] = CLIPS) -> list[np.ndarray]:
    """The clipped gradients in float64, stage by stage."""
    clipped = [g.double().numpy() for g in gradients]
    for stage in order:
        if stage in clips:
            clipped = STAGES[stage](clipped, clips[stage])
    return clipped


def optimizer(executor: str = "reference", **clips: Any) -> Optimizer:
    """Clips by attribute: the constructor refuses both norms together, assignment does not."""
    made: Optimizer = SGD(1.0, executor=executor)
    for key, value in clips.items():
        setattr(made, key, value)
    return made


def clipped(made: Optimizer, gradients: Sequence[Any], dtype: torch.dtype | None = None) -> list[Tensor]:
    variables = [torch.zeros(torch.as_tensor(g).shape, dtype=dtype or torch.as_tensor(g).dtype) for g in gradients]
    made.apply_gradients(list(zip(gradients, variables, strict=True)))
    return [-v for v in variables]


def close(got: Sequence[Tensor], want: Sequence[np.ndarray]) -> bool:
    return all(
        bool(np.all(np.abs(g.double().numpy() - w) <= ULPS * torch.finfo(g.dtype).eps * np.abs(w))) for g, w in zip(got, want, strict=True)
    )


LIMITS = (0.3, 2.0, 1e6)
CHOSEN = [chosen for n in (1, 2, 3) for chosen in itertools.combinations(CLIPS, n)]
COMBINATIONS = [dict(zip(chosen, limits, strict=True)) for chosen in CHOSEN for limits in itertools.product(LIMITS, repeat=len(chosen))]


@pytest.mark.parametrize("clips", COMBINATIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_formulas(dtype: torch.dtype, clips: dict[str, float]) -> None:
    gradients = [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate([(7,), (3, 5), (), (400,), (0,)])]
    want = oracle(gradients, clips)
    assert close(clipped(optimizer(**clips), gradients), want)
    assert_same(*([bits(g) for g in clipped(optimizer(executor, **clips), gradients)] for executor in EXECUTORS))


@pytest.mark.parametrize("order", list(itertools.permutations(CLIPS))[1:], ids="-".join)
def test_stages_run_in_keras_order(order: Sequence[str]) -> None:
    gradients = [torch.tensor([3.0, 0.5, -4.0]), torch.tensor([0.1, 0.2])]
    clips = {"clipvalue": 1.0, "clipnorm": 1.2, "global_clipnorm": 1.1}
    got = clipped(optimizer(**clips), gradients)
    assert close(got, oracle(gradients, clips))
    assert not close(got, oracle(gradients, clips, order))


# (limits, gradients, what they become), exactly
EXACT: list[tuple[dict[str, float], list[list[float]], list[list[float]]]] = [
    ({"clipvalue": 2.0}, [[3.0, -3.0, 1.5, -0.0]], [[2.0, -2.0, 1.5, -0.0]]),
    ({"clipvalue": 2.0}, [[NAN, INF, -INF]], [[NAN, 2.0, -2.0]]),
    ({"clipvalue": 0.0}, [[3.0, -INF, NAN]], [[0.0, 0.0, NAN]]),
    ({"clipnorm": 5.0}, [[6.0, 8.0], [0.6, 0.8]], [[3.0, 4.0], [0.6, 0.8]]),
    ({"clipnorm": 0.0}, [[6.0, 8.0], [0.0, 0.0]], [[0.0, 0.0], [NAN, NAN]]),
    ({"clipnorm": 2.0}, [[0.0, 0.0]], [[0.0, 0.0]]),
    ({"clipnorm": 2.0}, [[INF, 1.0, -1.0], [1.0]], [[NAN, 0.0, -0.0], [1.0]]),
    ({"clipnorm": 2.0}, [[NAN, 1.0], [1.0]], [[NAN, NAN], [1.0]]),
    ({"global_clipnorm": 5.0}, [[6.0], [8.0], [0.0]], [[3.0], [4.0], [0.0]]),
    ({"global_clipnorm": 16.0}, [[6.0], [8.0]], [[6.0], [8.0]]),
    ({"global_clipnorm": 5.0}, [[0.0], [0.0]], [[0.0], [0.0]]),
    ({"global_clipnorm": 0.0}, [[3.0], [4.0]], [[0.0], [0.0]]),
    ({"global_clipnorm": 0.0}, [[0.0]], [[NAN]]),
    ({"global_clipnorm": 5.0}, [[INF, 0.0], [1.0]], [[NAN, NAN], [NAN]]),
    ({"global_clipnorm": 5.0}, [[NAN], [1.0, 2.0]], [[NAN], [NAN, NAN]]),
    ({"clipvalue": 4.0, "global_clipnorm": 4.0}, [[INF, 0.0], [0.0]], [[4.0, 0.0], [0.0]]),
    ({"clipnorm": 4.0, "global_clipnorm": 4.0}, [[INF], [1.0]], [[NAN], [NAN]]),
    ({"clipvalue": 8.0, "clipnorm": 5.0, "global_clipnorm": 2.5}, [[60.0, 6.0]], [[2.0, 1.5]]),
]


@pytest.mark.parametrize(("clips", "given", "want"), EXACT, ids=range(len(EXACT)))
@every_executor
def test_special_cases(executor: str, clips: dict[str, float], given: list[list[float]], want: list[list[float]]) -> None:
    got = clipped(optimizer(executor, **clips), [torch.tensor(g) for g in given])
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g.isnan(), torch.tensor(w).isnan())
        assert torch.equal(torch.nan_to_num(g), torch.nan_to_num(torch.tensor(w)))


@every_executor
def test_below_the_limit_a_gradient_is_still_multiplied_and_divided(executor: str) -> None:
    g = randn(1000) / 1000
    got = clipped(optimizer(executor, clipnorm=3.0), [g])[0]
    assert torch.equal(got, g * 3.0 / 3.0)
    assert not torch.equal(got, g)


@every_executor
def test_one_global_norm_for_all_dtypes(executor: str) -> None:
    gradients = [randn(4), randn(3, seed=1, dtype=torch.float64), randn(2, 2, seed=2, dtype=torch.float16)]
    assert close(clipped(optimizer(executor, global_clipnorm=0.5), gradients), oracle(gradients, {"global_clipnorm": 0.5}))


@pytest.mark.parametrize("clip", CLIPS)
def test_sparse_gradients_are_clipped_as_stored(clip: str) -> None:
    rows = torch.tensor([[3.0, 0.0], [0.0, 4.0], [3.0, 0.0]])
    sparse = torch.sparse_coo_tensor([[2, 0, 2]], rows, (4, 2), check_invariants=True)
    variable = torch.zeros(4, 2)
    optimizer(**{clip: 2.5}).apply_gradients([(sparse, variable)])
    values = oracle([rows], {clip: 2.5})[0]  # clipped before the two rows of index 2 are summed
    want = np.zeros((4, 2))
    np.add.at(want, [2, 0, 2], values)
    assert close([-variable], [want])


@pytest.mark.parametrize("clip", CLIPS)
@every_class
def test_limits_may_be_set_and_removed_between_steps(name: str, clip: str) -> None:
    changed, variable = make(name), torch.ones(6)
    changed.apply_gradients([(randn(6), variable)])
    for seed, limit in enumerate((0.25, None, 4.0)):
        setattr(changed, clip, limit)
        assert (getattr(changed, clip), changed.get_config().get(clip)) == (limit, limit)
        twin, same = make(name, **{clip: limit}), torch.ones(6)
        twin.apply_gradients([(randn(6), same)])  # only to have weights
        twin.set_weights(changed.get_weights())
        same.copy_(variable)
        for o, v in ((changed, variable), (twin, same)):
            o.apply_gradients([(randn(6, seed=seed), v)])
        assert_same(state(changed, [variable]), state(twin, [same]))


def test_transformers_and_limits_exclude_each_other() -> None:
    transformers = [lambda pairs: pairs]
    made = SGD(clipvalue=1.0)
    with pytest.raises(ValueError, match=r"`gradient_transformers` cannot be combined with \['clipvalue'\]"):
        made.gradient_transformers = transformers
    assert (made.gradient_transformers, made.clipvalue) == ([], 1.0)
    made = SGD(gradient_transformers=transformers)
    for clip in CLIPS:
        with pytest.raises(ValueError, match=rf"`gradient_transformers` cannot be combined with \['{clip}'\]"):
            setattr(made, clip, 0.0)
        assert getattr(made, clip) is None
    made.gradient_transformers = []
    made.clipnorm = made.global_clipnorm = 1.0  # refused together by the constructor only


@every_executor
@every_class
def test_grad_scale_is_exact_and_comes_first(name: str, executor: str) -> None:
    outcomes = []
    for scale in (1.0, 2.0**-10, 2.0**10):
        made, variable = make(name, clipvalue=0.5, executor=executor), randn(9)
        made.grad_scale = scale
        made.apply_gradients([(randn(9, seed=1) / scale, variable)])
        outcomes.append(state(made, [variable]))
    assert_same(outcomes[0], outcomes[1])
    assert_same(outcomes[0], outcomes[2])
