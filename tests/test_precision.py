"""Precision policies on every executor: equal bits, one launch, states that can be saved, and what is refused."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support import RULES, assert_same, bits, build, launches, randn, state
from torch import Tensor

import fused_kopt
from fused_kopt import Precision, checkpoint, optimizers, precision
from fused_kopt.optimizer import Optimizer

SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (63,), (64,), (65,), (8193,), (3, 5, 7))
POLICIES: dict[str, Precision] = {
    **precision.NAMED,
    "e4m3": Precision(slots="float8_e4m3"),
    "e5m2 at random": Precision(master="int16", slots="float8_e5m2", rounding="stochastic", seed=9),
    "float16": Precision(slots="float16"),
    "int8": Precision(master="int8"),
    "block8": Precision(master="int8", slots="block8"),
}
CENTERED = {"centered", "centered_with_momentum"}
CASES = [
    (rule, name)  # general powers are exact to 2 ulp only, which codes of 8 bits make visible
    for rule in RULES
    for name, p in POLICIES.items()
    if "power" not in rule and (rule not in CENTERED or p.slots == "float32")
]


def variables(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(SHAPES)]


def gradients(step: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [randn(*shape, seed=100 * step + i, dtype=dtype) * 0.1 for i, shape in enumerate(SHAPES)]


def trained(rule: str, executor: str, policy: Any, steps: int = 3, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    optimizer, values = build(rule, executor, precision=policy, **options), variables(dtype)
    for step in range(steps):
        optimizer.apply_gradients(zip(gradients(step, dtype), values, strict=True))
    return optimizer, values


@pytest.mark.slow(every=19)
@pytest.mark.parametrize("executor", ["compiled", "triton"])
@pytest.mark.parametrize(("rule", "policy"), CASES)
def test_executors_agree(rule: str, policy: str, executor: str) -> None:
    first, second = (trained(rule, e, POLICIES[policy]) for e in (executor, "reference"))
    assert_same(state(*first), state(*second))


@pytest.mark.parametrize("executor", ["compiled", "triton"])
@pytest.mark.parametrize(
    "policy", [Precision(slots="block8"), Precision(slots="bfloat16", rounding="stochastic"), Precision(slots="float8_e4m3")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_variables_of_other_dtypes(policy: Precision, dtype: torch.dtype, executor: str) -> None:
    first, second = (trained("amsgrad", e, policy, dtype=dtype) for e in (executor, "reference"))
    assert_same(state(*first), state(*second))


@pytest.mark.parametrize("policy", list(precision.NAMED))
def test_one_launch(policy: str) -> None:
    optimizer, values = trained("adam", "compiled", policy)
    with launches(1):
        optimizer.apply_gradients(zip(gradients(5), values, strict=True))


@pytest.mark.parametrize("executor", ["compiled", "triton", "reference"])
@pytest.mark.parametrize("policy", ["bf16_8bit", "bf16_stochastic"])
def test_clipping_rates_of_variables_absent_and_late_variables(policy: str, executor: str) -> None:
    found = []
    for chosen in (executor, "reference"):
        optimizer, values = build("adam", chosen, precision=policy, global_clipnorm=0.5, clipvalue=0.2), variables()
        optimizer.scale_learning_rate(values[:3], 0.5)
        for step in range(6):
            pairs = list(zip(gradients(step), values, strict=True))[: 5 if step < 2 else None]
            optimizer.apply_gradients([(None if i == step else g, v) for i, (g, v) in enumerate(pairs)])
        found.append(state(optimizer, values))
    assert_same(*found)


@pytest.mark.parametrize("policy", ["bf16_8bit", "bf16_split", "bf16_kahan"])
def test_layouts(policy: str) -> None:
    """A variable with gaps, a transposed one, a gradient laid out otherwise: the numbers of a plain one, in its own layout."""
    results = []
    for executor in ("compiled", "reference", "triton"):
        gaps = randn(40, 6, dtype=torch.bfloat16)[:, ::2]
        turned = randn(6, 40, seed=1, dtype=torch.bfloat16).t()
        optimizer = build("adam", executor, precision=policy)
        for step in range(3):
            gradient = randn(40, 3, seed=step, dtype=torch.bfloat16)
            optimizer.apply_gradients([(gradient, gaps), (randn(40, 6, seed=step, dtype=torch.bfloat16), turned)])
        results.append(state(optimizer, [gaps, turned]))
    assert_same(results[0], results[1])
    assert_same(results[2], results[1])


@pytest.mark.parametrize("rule", ["sgd", "adam", "ftrl", "adagrad"])
@pytest.mark.parametrize("policy", ["bf16_8bit", "bf16_stochastic", "bf16_split"])
def test_flatten_changes_nothing(rule: str, policy: str) -> None:
    found = []
    for flat in (False, True):
        optimizer, values = build(rule, "compiled", precision=policy), [v.requires_grad_() for v in variables()]
        given = optimizer.flatten(values) if flat else values
        for step in range(5):
            for v, g in zip(values, gradients(step), strict=True):
                v.grad = g if v.grad is None or not flat else v.grad.copy_(g)
            optimizer.apply_gradients(given if flat else [(v.grad, v) for v in values])  # type: ignore[arg-type]
        found.append(state(optimizer, values))
    assert_same(*found)


@pytest.mark.parametrize("seed", [0, 1, 4294967295])
def test_the_seed_decides(seed: int) -> None:
    runs = [trained("adam", "compiled", Precision(slots="bfloat16", rounding="stochastic", seed=s)) for s in (seed, seed, 77)]
    assert_same(state(*runs[0]), state(*runs[1]))
    assert not torch.equal(runs[0][1][6], runs[2][1][6])


def test_every_variable_gets_noise_of_its_own() -> None:
    values = [torch.full((4096,), 1.0, dtype=torch.bfloat16) for _ in range(2)]
    optimizer = fused_kopt.SGD(1e-3, precision="bf16_stochastic")
    optimizer.apply_gradients([(torch.ones_like(v), v) for v in values])
    assert 0.05 < float((values[0] != values[1]).float().mean()) < 0.95


@pytest.mark.parametrize("policy", list(POLICIES))
def test_pickle_deepcopy_and_files_go_on_bit_for_bit(policy: str, tmp_path: Path) -> None:
    names = [f"v{i}" for i in range(len(SHAPES))]
    optimizer, values = trained("adam", "compiled", POLICIES[policy])
    checkpoint.save(tmp_path / "run.safetensors", optimizer, zip(names, values, strict=True), with_values=True)
    copies: list[tuple[Optimizer, list[Tensor]]] = [pickle.loads(pickle.dumps((optimizer, values))), copy.deepcopy((optimizer, values))]
    loaded, fresh = fused_kopt.Adam(precision=POLICIES[policy], executor="compiled"), variables()
    checkpoint.load(tmp_path / "run.safetensors", loaded, zip(names, fresh, strict=True), with_values=True)
    copies.append((loaded, fresh))
    for step in range(3, 6):
        for one, mine in ((optimizer, values), *copies):
            one.apply_gradients(zip(gradients(step), mine, strict=True))
    for one, mine in copies:
        assert_same(state(one, mine), state(optimizer, values))


def test_a_file_of_another_policy_is_refused(tmp_path: Path) -> None:
    optimizer, values = trained("adam", "reference", "bf16_split")
    named = [(f"v{i}", v) for i, v in enumerate(values)]
    checkpoint.save(tmp_path / "run.safetensors", optimizer, named)
    with pytest.raises(fused_kopt.errors.CheckpointError, match="precision"):
        checkpoint.load(tmp_path / "run.safetensors", fused_kopt.Adam(precision="bf16_8bit"), named)


@pytest.mark.parametrize("policy", list(POLICIES))
def test_weights_and_configuration(policy: str) -> None:
    optimizer, values = trained("adam", "reference", POLICIES[policy])
    twin = type(optimizer).from_config(optimizer.get_config())
    assert twin.precision == POLICIES[policy]
    assert ("precision" in optimizer.get_config()) == (policy != "float32")
    twin.build(values)
    twin.set_weights(optimizer.get_weights())
    assert_same([bits(w) for w in twin.weights], [bits(w) for w in optimizer.weights])
    assert optimizers.get(optimizers.serialize(optimizer)).precision == POLICIES[policy]  # type: ignore[attr-defined]


def test_slots_and_masters_can_be_read() -> None:
    plain, values = trained("adam", "reference", "float32", dtype=torch.float32)
    packed, stored = trained("adam", "reference", "bf16_8bit")
    assert packed.get_slot_names() == ["m", "m_scale", "v", "v_scale", "remainder"]
    for name in ("m", "v"):
        slot = packed.get_slot(stored[7], name)
        assert (slot.shape, slot.dtype) == (stored[7].shape, torch.float32)
        torch.testing.assert_close(slot, plain.get_slot(values[7], name), rtol=0.3, atol=1e-3)  # three steps of 1/16 each
    master = packed.get_master(stored[7])
    assert torch.equal(master.bfloat16(), stored[7])
    assert not torch.equal(master, stored[7].float())
    assert plain.get_master(values[7]) is not None
    assert torch.equal(plain.get_master(values[7]), values[7])
    with pytest.raises(KeyError, match="no slots yet"):
        packed.get_master(torch.zeros(3))


def test_policies_of_single_variables() -> None:
    """Norms in float32, matrices in few bits: a bucket each, and the bits of optimizers of their own."""
    matrix, norm = randn(40, 30, dtype=torch.bfloat16), randn(30, dtype=torch.float32)
    optimizer = fused_kopt.Adam(precision="bf16_8bit")
    optimizer.set_precision([norm], "float32")
    own = [(fused_kopt.Adam(precision="bf16_8bit"), matrix.clone()), (fused_kopt.Adam(), norm.clone())]
    for step in range(3):
        pairs = [(randn(40, 30, seed=step, dtype=torch.bfloat16), matrix), (randn(30, seed=step), norm)]
        optimizer.apply_gradients(pairs)
        for (one, v), (g, _) in zip(own, pairs, strict=True):
            one.apply_gradients([(g, v)])
    assert torch.equal(matrix, own[0][1])
    assert torch.equal(norm, own[1][1])
    assert optimizer.get_slot_names() == ["m", "m_scale", "v", "v_scale", "remainder"]
    with pytest.raises(ValueError, match=r"Variable 0 \(30,\) has slots already"):
        optimizer.set_precision([norm], "float32")


def test_a_master_follows_a_variable_that_somebody_else_wrote() -> None:
    v = torch.ones(100, dtype=torch.bfloat16)
    optimizer = fused_kopt.SGD(0.5, precision="bf16_master")
    optimizer.apply_gradients([(torch.zeros(100), v)])
    v.fill_(3.0)
    optimizer.apply_gradients([(torch.full((100,), 2.0), v)])
    assert bool((v == 2.0).all())


BF16 = torch.zeros(3, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("rule", "policy", "variable", "message"),
    [
        ("adam", "bf16_split", torch.zeros(3), r"variable 0 \(3,\) is torch.float32, but .*int16.* needs a bfloat16 variable"),
        ("adam", "bf16_master", torch.zeros(3, dtype=torch.float16), "is torch.float16, but .* needs a bfloat16 variable"),
        ("adam", Precision(slots="block8"), torch.zeros(3, dtype=torch.float64), "needs float32 slots for float64 variables"),
        ("adam", Precision(slots=(("momentum", "bfloat16"),)), BF16, r"names slots that this optimizer lacks: \['momentum'\]"),
        ("centered", "bf16_8bit", BF16, r"stores \['rms', 'mg'\] in few bits; rms - mg\^2"),
    ],
)
def test_refused(rule: str, policy: Any, variable: Tensor, message: str) -> None:
    optimizer = build(rule, precision=policy)
    for attempt in (lambda: optimizer.apply_gradients([(torch.ones_like(variable), variable)]), lambda: optimizer.build([variable])):
        with pytest.raises(ValueError, match=message):
            attempt()
    assert int(optimizer.iterations) == 0
    assert optimizer.get_slot_names() == []


def test_sparse_gradients_are_refused() -> None:
    v = torch.zeros(4, 3, dtype=torch.bfloat16)
    sparse = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 3, dtype=torch.bfloat16), (4, 3), check_invariants=False)
    with pytest.raises(TypeError, match=r"gradient of variable 0 \(4, 3\) is sparse, which Precision\(master='int16'"):
        fused_kopt.Adam(precision="bf16_split").apply_gradients([(sparse, v)])
    assert not v.any()


def test_verify_sees_planes() -> None:
    optimizer, values = trained("adam", "compiled", "bf16_8bit")
    report = fused_kopt.verify(optimizer, list(zip(gradients(7), values, strict=True)), executor="triton")
    assert report.equal
    assert {c.tensor for c in report.comparisons} == {"variable", "m", "m_scale", "v", "v_scale", "remainder"}
