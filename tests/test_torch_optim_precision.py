"""Precision policies of torch_optim: the bits of fused_kopt's own classes, groups of several policies, states that go on, refusals."""

import copy
import io
import json
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same, bits, launches, randn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch_classes import CASES, build, give, keras, mlp, parameters, snapshot, steps

import fused_kopt
from fused_kopt import Precision, checkpoint, hf, precision, torch_optim
from fused_kopt.errors import CheckpointError
from fused_kopt.slots import flatten
from fused_kopt.torch_optim import stored

BF16, F32 = torch.bfloat16, torch.float32
SHAPES: Sequence[tuple[int, ...]] = ((), (0,), (1,), (64,), (65,), (4, 3, 5), (8193,))
POLICIES: dict[str, Precision] = {
    **precision.NAMED,
    "e4m3": Precision(slots="float8_e4m3"),
    "e5m2 at random": Precision(master="int16", slots="float8_e5m2", rounding="stochastic", seed=9),
    "by name": Precision(master="int8", slots=(("exp_avg_sq", "block8"),), rounding="stochastic", seed=3),
}
PAIRS = [
    (case, name)
    for case in CASES
    for name, policy in POLICIES.items()
    if name != "by name" and (case != "rmsprop_all" or policy.slots == "float32")
]
each_policy = pytest.mark.parametrize("policy", POLICIES)


def given(name: str) -> Any:
    """As users write it: a name, or a Precision."""
    return name if name in precision.NAMED else POLICIES[name]


def compare_with_keras(
    case: str, policy: str, executor: Any, shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = BF16
) -> None:
    params = parameters(dtype, shapes)
    variables = [param.detach().clone() for param in params]
    ours, theirs = build(case, params, executor=executor, precision=given(policy)), keras(case, precision=given(policy))
    for step in range(4):
        give(params, step)
        ours.step()
        theirs.apply_gradients([(p.grad, v) for p, v in zip(params, variables, strict=True)])
    assert_same([bits(p) for p in params], [bits(v) for v in variables])
    state = [ours.state[p][name] for p in params for name in ours.state[p] if name not in ours.counters]
    assert not Counter(bits(t).tobytes() for t in state) - Counter(bits(w).tobytes() for w in theirs.weights)
    for param, variable in zip(params, variables, strict=True):
        assert torch.equal(ours.get_master(param), theirs.get_master(variable))


@pytest.mark.slow(every=7)
@pytest.mark.parametrize("executor", ["reference", "compiled"])
@pytest.mark.parametrize(("case", "policy"), PAIRS)
def test_the_bits_of_the_keras_class(case: str, policy: str, executor: str) -> None:
    compare_with_keras(case, policy, executor)


@pytest.mark.parametrize("case", CASES)
def test_slots_are_declared_alike(case: str) -> None:
    """Which are never negative decides their codes."""
    optimizer = build(case, parameters())
    mine = stored.slots(optimizer, optimizer.param_groups[0])
    assert [slot[1:] for slot in mine] == [slot[1:] for slot in flatten(keras(case).slot_groups())]


@pytest.mark.parametrize(
    ("case", "policy"), [("adam", "bf16_8bit"), ("ftrl", "bf16_stochastic"), ("momentum", "bf16_split"), ("lion", "e4m3")]
)
def test_triton_has_them_too(case: str, policy: str) -> None:
    compare_with_keras(case, policy, "triton", ((65,), (3, 5)))


@pytest.mark.parametrize("dtype", [F32, torch.float16])
def test_parameters_of_other_dtypes(dtype: torch.dtype) -> None:
    compare_with_keras("amsgrad", "e4m3", "compiled", dtype=dtype)


@each_policy
def test_what_a_state_holds(policy: str) -> None:
    """Each plane under its slot's name, in its own dtype; grouped ones a value for 64 elements."""
    params = parameters(BF16, SHAPES)
    optimizer = build("adam", params, precision=given(policy))
    steps(optimizer, params, [0])
    planes = [plane for plane in POLICIES[policy].planes(BF16, (stored.slots(optimizer, optimizer.param_groups[0]),)) if plane.group]
    for param in params:
        state = dict(optimizer.state[param])
        assert float(state.pop("step")) == 1
        assert list(state) == [plane.name for plane in planes]
        for plane, tensor in zip(planes, state.values(), strict=True):
            assert tensor.dtype == (plane.stored or F32)
            assert tensor.shape == (param.shape if plane.group == 1 else (-(-param.numel() // 64),))


def test_one_launch() -> None:
    params = parameters(BF16, SHAPES)
    optimizer = build("adam", params, precision="bf16_8bit", executor="compiled")
    steps(optimizer, params, range(2))
    give(params, 3)
    with launches(1):
        optimizer.step()
    (bucket,) = optimizer.describe().buckets
    assert (bucket.precision, bucket.slots) == ("bf16_8bit", ("exp_avg", "exp_avg_sq"))
    state = [t for p in params for name, t in optimizer.state[p].items() if name != "step"]
    assert bucket.bytes_at_rest == sum(t.numel() * t.itemsize for t in state)


@pytest.mark.parametrize("executor", ["reference", "compiled"])
def test_weight_decay_is_not_lost(executor: Any) -> None:
    """lr 1e-3 and weight decay 0.1 take 1e-4 of a weight, a bfloat16 ends at 2^-9: rounding the decayed weight gives the weight back."""
    start, count = torch.full((16_384,), 0.9375, dtype=BF16), 200
    separate = start.clone()
    for _ in range(count):
        separate.mul_(1 - 1e-3 * 0.1)
    assert torch.equal(separate, start)
    found = {}
    for policy in ("float32", "bf16_split", "bf16_stochastic"):
        param = torch.nn.Parameter(start.clone())
        optimizer = torch_optim.AdamW([param], lr=1e-3, weight_decay=0.1, precision=policy, executor=executor)
        for _ in range(count):
            param.grad = torch.zeros_like(param)
            optimizer.step()
        found[policy] = optimizer.get_master(param).double().mean()
    expected = 0.9375 * (1 - 1e-4) ** count
    assert found["float32"] == 0.9375
    assert abs(found["bf16_split"] - expected) < count * 2**-25  # half a unit in the last place of a float32 below 1, each step
    # each step errs by at most half the distance of two bfloat16 below 1, 2^-9, at random: six standard deviations of the mean
    assert abs(found["bf16_stochastic"] - expected) < 6 * 2**-9 * (count / start.numel()) ** 0.5


@pytest.mark.parametrize(
    ("cls", "keywords"), [("AdamW", {"weight_decay": 0.1}), ("Adam", {"weight_decay": 0.1}), ("Lion", {"weight_decay": 0.3})]
)
def test_a_lossless_master_is_float32_training(cls: str, keywords: dict[str, float]) -> None:
    """With decay or penalty inside the launch, before the one rounding."""
    params = parameters(BF16, SHAPES)
    others = [torch.nn.Parameter(p.detach().float()) for p in params]
    ours, theirs = (
        getattr(torch_optim, cls)(ps, lr=1e-2, precision=p, **keywords) for ps, p in ((params, "bf16_split"), (others, "float32"))
    )
    for step in range(20):
        give(params, step)
        for param, other in zip(params, others, strict=True):
            other.grad = param.grad.float()  # type: ignore[union-attr]
        ours.step()
        theirs.step()
    for param, other in zip(params, others, strict=True):
        assert torch.equal(ours.get_master(param), other)


class Mixed:
    """Matrices in few bits, norms in float32, others with a master: three policies in one optimizer."""

    def __init__(self, **more: Any) -> None:
        self.matrices, self.others = parameters(BF16, ((40, 30), (65,))), parameters(BF16, ((12, 7),))
        self.norms = parameters(F32, ((30,), (7,)))
        self.params = [*self.matrices, *self.norms, *self.others]
        groups = [
            {"params": self.matrices},
            {"params": self.norms, "precision": "float32"},
            {"params": self.others, "precision": POLICIES["by name"], "weight_decay": 0.5},
        ]
        self.optimizer = torch_optim.AdamW(groups, precision="bf16_8bit", **more)


@pytest.mark.parametrize("executor", ["reference", "compiled"])
def test_groups_of_several_policies(executor: Any) -> None:
    """The bits of an optimizer for each; of one in which nobody else has gradients, where noise counts those before it."""
    mixed, alone, last = (Mixed(executor=executor) for _ in range(3))
    own = [torch_optim.AdamW(alone.matrices, precision="bf16_8bit"), torch_optim.AdamW(alone.norms), last.optimizer]
    for step in range(4):
        for world in (mixed, alone, last):
            give(world.params, step)
        for param in (*last.matrices, *last.norms):
            param.grad = None
        before = fused_kopt.stats().launches
        mixed.optimizer.step()
        assert not step or fused_kopt.stats().launches - before == (0 if executor == "reference" else 3)  # the first one proves kernels
        for one in own:
            one.step()
    expected = (*alone.matrices, *alone.norms, *last.others)
    assert_same([bits(p) for p in mixed.params], [bits(p) for p in expected])
    assert list(mixed.optimizer.state[mixed.others[0]]) == ["exp_avg", "exp_avg_sq", "exp_avg_sq_scale", "remainder", "step"]
    assert [b.precision for b in mixed.optimizer.describe().buckets] == ["bf16_8bit", "float32", repr(POLICIES["by name"])]
    assert [g["precision"] for g in mixed.optimizer.param_groups][:2] == ["bf16_8bit", "float32"]


def test_the_last_group_fails_before_the_first_is_launched() -> None:
    mixed = Mixed(executor="compiled")
    steps(mixed.optimizer, mixed.params, range(2))
    before = snapshot(mixed.optimizer, mixed.params)
    give(mixed.params, 3)
    whole = mixed.optimizer.state[mixed.others[0]]["remainder"]
    mixed.optimizer.state[mixed.others[0]]["remainder"] = whole[:3].clone()
    with pytest.raises(ValueError, match=r"'remainder' of parameter 0 of group 2 .* is of shape \(3, 7\)"):
        mixed.optimizer.step()
    mixed.optimizer.state[mixed.others[0]]["remainder"] = whole
    assert_same(snapshot(mixed.optimizer, mixed.params), before)


@pytest.mark.parametrize("policy", ["bf16_stochastic", "bf16_8bit"])
def test_noise_depends_on_nobody_else(policy: str) -> None:
    """Who has a gradient changes nobody else's bits, and two parameters alike get noise of their own."""
    runs = []
    for absent in (False, True):
        params = parameters(BF16, ((70,), (200,), (300,)))
        optimizer = build("adam", params, precision=policy)
        for step in range(3):
            give(params, step)
            if absent and step == 1:
                params[0].grad = None
            optimizer.step()
        runs.append([bits(p) for p in params[1:]])
    assert_same(*runs)
    twins = [torch.nn.Parameter(torch.ones(4096, dtype=BF16)) for _ in range(2)]
    optimizer = torch_optim.SGD(twins, lr=1e-3, precision=policy)
    for twin in twins:
        twin.grad = torch.ones_like(twin)
    optimizer.step()
    masters = [optimizer.get_master(twin) if policy == "bf16_stochastic" else optimizer.state[twin]["remainder"] for twin in twins]
    assert torch.equal(*masters) == (policy == "bf16_8bit")  # SGD has no slots, and a remainder is not random


def saved(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


WAYS: dict[str, Callable[[Any], Any]] = {
    "state_dict": lambda o: o.state_dict(),
    "saved": lambda o: saved(o.state_dict()),
    "pickle": lambda o: pickle.loads(pickle.dumps(o)),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.slow(every=3)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", ["adam", "nadam", "adagrad"])
@each_policy
def test_resumption_is_bit_equal(case: str, policy: str, way: str) -> None:
    if policy == "by name" and case == "adagrad":
        policy = "e4m3"
    straight, params = parameters(BF16, SHAPES), parameters(BF16, SHAPES)
    reference, optimizer = (build(case, ps, executor="compiled", precision=given(policy)) for ps in (straight, params))
    steps(reference, straight, range(6))
    steps(optimizer, params, range(3))
    kept = WAYS[way](optimizer)
    if isinstance(kept, dict):
        new = [torch.nn.Parameter(param.detach().clone()) for param in params]
        resumed = build(case, new, lr=77.0, precision=given(policy), executor="compiled")
        resumed.load_state_dict(kept)
    else:
        resumed, new = kept, kept.param_groups[0]["params"]
    steps(optimizer, params, [10])  # shares nothing with the resumed one
    steps(resumed, new, range(3, 6))
    assert_same(snapshot(resumed, new), snapshot(reference, straight))
    kinds = [{name: t.dtype for name, t in o.state[p].items()} for o, p in ((resumed, new[4]), (reference, straight[4]))]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("flat", [False, True])
@each_policy
def test_distributed_checkpoint(policy: str, flat: bool) -> None:
    """In one process: the dummy step makes the planes, and a resumed run has the same bits."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    straight, model, other = mlp().bfloat16(), mlp().bfloat16(), mlp(1).bfloat16()
    reference, optimizer, resumed = (torch_optim.AdamW(m.parameters(), precision=given(policy)) for m in (straight, model, other))

    def train(one: torch.nn.Module, owner: Any, which: Sequence[int]) -> None:
        for step in which:
            give(list(one.parameters()), step)
            owner.step()

    train(straight, reference, range(6))
    train(model, optimizer, range(3))
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, resumed, state, options=options)
    train(other, resumed, range(3, 6))
    assert_same(snapshot(resumed, list(other.parameters())), snapshot(reference, list(straight.parameters())))


@pytest.mark.parametrize("policy", ["bf16_8bit", "bf16_split", "bf16_kahan"])
def test_layouts(policy: str) -> None:
    """A parameter with gaps and a transposed one, on every executor, with remainders that somebody laid out otherwise: where nothing is
    random, the numbers of contiguous ones."""
    results = []
    for executor in ("compiled", "reference", "triton"):
        params = [
            torch.nn.Parameter(randn(40, 6, dtype=BF16)[:, ::2]),
            torch.nn.Parameter(randn(6, 40, seed=1, dtype=BF16).t()),
        ]
        optimizer = build("adam", params, precision=policy, executor=executor)
        for step in range(3):
            give(params, step)
            optimizer.step()
            for state in (optimizer.state[p] for p in params):
                name = precision.MASTERS[precision.NAMED[policy].master][1]
                state[name] = state[name].contiguous() if step % 2 else state[name].t().contiguous().t()
        results.append(snapshot(optimizer, params) + [bits(optimizer.get_master(p)) for p in params])
    assert_same(results[0], results[1])
    assert_same(results[2], results[1])
    if not precision.NAMED[policy].random:
        plain = [
            torch.nn.Parameter(p.detach().contiguous()) for p in (randn(40, 6, dtype=BF16)[:, ::2], randn(6, 40, seed=1, dtype=BF16).t())
        ]
        optimizer = build("adam", plain, precision=policy)
        steps(optimizer, plain, range(3))
        assert_same(results[1], snapshot(optimizer, plain) + [bits(optimizer.get_master(p)) for p in plain])


def test_groups_hold_names_and_plain_dicts() -> None:
    """Which JSON and weights_only loaders know, schedulers leave alone, and a Precision comes back from."""
    params = parameters(BF16)
    optimizer = torch_optim.Adam(params, precision=POLICIES["by name"])
    assert torch_optim.Adam(params, precision=Precision(master="int16")).param_groups[0]["precision"] == "bf16_split"
    group = optimizer.param_groups[0]
    assert group["precision"] == {"master": "int8", "slots": (("exp_avg_sq", "block8"),), "rounding": "stochastic", "seed": 3}
    assert precision.get(json.loads(json.dumps(group["precision"]))) == POLICIES["by name"]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    steps(optimizer, params, [0])
    scheduler.step()
    again = torch_optim.Adam(parameters(BF16), precision=group["precision"])
    again.load_state_dict(saved(optimizer.state_dict()))
    assert again.param_groups[0]["precision"] == group["precision"]
    optimizer.add_param_group({"params": parameters(), "precision": "float32"})
    optimizer.add_param_group({"params": parameters(BF16)})
    assert [g["precision"] for g in optimizer.param_groups] == [group["precision"], "float32", group["precision"]]


def test_states_of_torch_load_without_a_policy_only() -> None:
    """A group of torch.optim's has no policy: this optimizer's stays, also where its default is another."""
    params = parameters()
    theirs = torch.optim.Adam(params)
    steps(theirs, params, [0])
    ours = torch_optim.Adam([{"params": params, "precision": "float32"}], precision="bf16_split")
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["precision"] == "float32"
    steps(ours, params, [1])
    with pytest.raises(ValueError, match="Group 0 of the state_dict has precision='float32', this Adam's has 'bf16_split'"):
        torch_optim.Adam(parameters(BF16), precision="bf16_split").load_state_dict(theirs.state_dict())


def test_masters_can_be_read() -> None:
    (param,) = parameters(BF16, ((65,),))
    for policy in ("bf16_8bit", "float32"):
        optimizer = torch_optim.Adam([param], precision=policy)
        with pytest.raises(KeyError, match=r"parameter \(65,\) has no state yet"):
            optimizer.get_master(param)
        steps(optimizer, [param], range(3))
        master = optimizer.get_master(param)
        assert master.dtype == (F32 if policy == "bf16_8bit" else BF16)
        assert not master.requires_grad
        assert torch.equal(master.bfloat16(), param)
        assert torch.equal(master, param.float()) == (policy == "float32")


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("policy", ["bf16_split", "bf16_kahan", "bf16_stochastic", "bf16_master", "bf16_8bit"])
def test_sharded_parameters(policy: str, one_rank: None) -> None:
    """Planes are DTensors like their parameters, those of scales, too."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model, other = mlp().bfloat16(), mlp().bfloat16()
    fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    optimizer, reference = (torch_optim.AdamW(m.parameters(), precision=policy) for m in (model, other))
    for step in range(3):
        for one, owner in ((model, optimizer), (other, reference)):
            owner.zero_grad()
            one(randn(6, 4, seed=step, dtype=BF16)).square().mean().backward()
            owner.step()
        optimizer.load_state_dict(optimizer.state_dict())
    for mine, whole in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine.full_tensor(), whole)  # type: ignore[attr-defined]
        assert torch.equal(optimizer.get_master(mine), reference.get_master(whole))
        assert all(isinstance(t, DTensor) for name, t in optimizer.state[mine].items() if name != "step")


def test_scales_that_shards_would_cut() -> None:
    """Refused before anything is made, by every way in."""
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        param = distribute_tensor(torch.ones(8, 4, dtype=BF16), mesh, [Shard(0)], src_data_rank=None).requires_grad_()
        param.grad = torch.ones_like(param)
        packed = torch_optim.AdamW([param], precision="bf16_8bit")
        what = r"parameter 0 of group 0 \(8, 4\) is placed as \(Shard\(dim=0\),\) on \(2,\) ranks, and Precision.* multiples of 64"
        for attempt in (packed.step, packed.describe):
            with pytest.raises(ValueError, match=what):
                attempt()
        assert not packed.state
    finally:
        torch.distributed.destroy_process_group()


def one(dtype: torch.dtype = BF16) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(3, dtype=dtype))


def stepped(make: Callable[[], Any]) -> Callable[[], Any]:
    """One step of an optimizer with a gradient for everything."""

    def run() -> None:
        optimizer = make()
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.ones_like(param)
        before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
        try:
            optimizer.step()
        finally:
            assert not optimizer.state
            assert all(map(torch.equal, optimizer.param_groups[0]["params"], before))

    return run


def changed(key: str, value: Any) -> Callable[[], Any]:
    """Loading a state of an 8-bit Adam in which one tensor is another."""

    def run() -> None:
        params = parameters(BF16, ((4, 20),))
        optimizer = torch_optim.Adam(params, precision="bf16_8bit")
        steps(optimizer, params, [0])
        state, before = copy.deepcopy(optimizer.state_dict()), snapshot(optimizer, params)
        state["state"][0][key] = value
        try:
            optimizer.load_state_dict(state)
        finally:
            assert_same(snapshot(optimizer, params), before)

    return run


def other_policy() -> None:
    params = parameters(BF16)
    optimizer = torch_optim.Adam(params, precision="bf16_8bit")
    steps(optimizer, params, [0])
    torch_optim.Adam(params, precision=Precision(master="int8", slots="block8")).load_state_dict(optimizer.state_dict())


def another_policy_between_steps() -> None:
    params = parameters(BF16)
    optimizer = torch_optim.Adam(params, precision=Precision(slots="float8_e4m3"))
    steps(optimizer, params, [0])
    optimizer.param_groups[0]["precision"] = {"slots": "block8"}
    steps(optimizer, params, [1])


def another_dtype() -> None:
    params = parameters(BF16)
    optimizer = torch_optim.Adam(params, precision="bf16_split")
    steps(optimizer, params, [0])
    optimizer.state[params[3]]["remainder"] = optimizer.state[params[3]]["remainder"].int()
    steps(optimizer, params, [1])


def another_layout() -> None:
    params = parameters(BF16, ((4, 20),))
    optimizer = torch_optim.Adam(params, precision="bf16_8bit")
    steps(optimizer, params, [0])
    params[0].data = params[0].data.t().contiguous().t()
    steps(optimizer, params, [1])


def two_policies_and_a_norm() -> None:
    mixed = Mixed(global_clipnorm=1.0)
    steps(mixed.optimizer, mixed.params, [0])


U8 = torch.zeros(4, 20, dtype=torch.uint8)
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "unknown": (
        lambda: torch_optim.Adam([one()], precision="bf8"),
        ValueError,
        "`precision` must be one of float32, .* Received: precision='bf8'",
    ),
    "number": (lambda: torch_optim.Adam([one()], precision=16), TypeError, "must be a name or a Precision. Received: int"),  # type: ignore[arg-type]
    "group": (lambda: torch_optim.Adam([{"params": [one()], "precision": "half"}]), ValueError, "`precision` must be one of"),
    "contradiction": (lambda: torch_optim.Adam([one()], precision={"master": "int16", "rounding": "stochastic"}), ValueError, "Nothing is"),
    "dtype": (
        stepped(lambda: torch_optim.Adam([("w", one(F32))], precision="bf16_split")),
        ValueError,
        r"parameter 'w' \(3,\) is torch.float32, but .*int16.* needs a bfloat16 variable. .* a parameter group of its own",
    ),
    "float64": (stepped(lambda: torch_optim.Adam([one(torch.float64)], precision=POLICIES["e4m3"])), ValueError, "for float64 variables"),
    "slot name": (stepped(lambda: torch_optim.SGD([one()], precision=POLICIES["by name"])), ValueError, r"lacks: \['exp_avg_sq'\]"),
    "centered": (
        stepped(lambda: torch_optim.RMSprop([one()], centered=True, precision="bf16_8bit")),
        ValueError,
        r"\['square_avg', 'grad_avg'\] in few bits; square_avg - grad_avg\^2",
    ),
    "describe": (
        torch_optim.Adam([one(F32)], precision="bf16_split").describe,
        ValueError,
        r"parameter 0 of group 0 \(3,\) is torch.float32",
    ),
    "file": (other_policy, ValueError, r"Group 0 of the state_dict has precision='bf16_8bit', this Adam's has \{'master': 'int8'"),
    "later": (another_policy_between_steps, ValueError, "Group 0 has state under .*e4m3.*received: .*block8.* fixed by the first"),
    "plane's dtype": (another_dtype, ValueError, r"'remainder' of parameter 3 of group 0 \(33,\) is of .*int32.*must be of .*int16"),
    "memory format": (another_layout, ValueError, r"'exp_avg' of parameter 0 .* is laid out otherwise .* share scales"),
    "global norm": (two_policies_and_a_norm, ValueError, "one rule for all groups, and one precision; .*adam in bf16_8bit"),
    "loaded dtype": (changed("remainder", torch.zeros(4, 20)), ValueError, r"'remainder' of .* must be of torch.int8 .* torch.float32"),
    "loaded scale": (changed("exp_avg_scale", torch.zeros(3)), ValueError, r"'exp_avg_scale' .* must be of torch.float32 and shape \(2,\)"),
    "loaded layout": (changed("exp_avg", U8.t().contiguous().t()), ValueError, "'exp_avg' of .* is laid out otherwise"),
}  # fmt: skip


@pytest.mark.parametrize("row", REFUSED)
def test_refused(row: str) -> None:
    make, error, message = REFUSED[row]
    with pytest.raises(error, match=message):
        make()


def test_hugging_face_arguments_name_a_policy() -> None:
    class Arguments:
        learning_rate, adam_beta1, adam_beta2, adam_epsilon, optim_args = 1e-3, 0.9, 0.999, 1e-8, "precision=bf16_8bit"

    cls, keywords = hf.optimizer_cls_and_kwargs("adamw", Arguments())
    assert cls([one()], **keywords).param_groups[0]["precision"] == "bf16_8bit"


@pytest.mark.parametrize("policy", ["bf16_split", "bf16_8bit"])
def test_clipping_and_statistics(policy: str) -> None:
    """On the fused executors as on the reference; sums of squares are added in another order, in float64."""
    found = []
    for executor in ("reference", "compiled"):
        params = parameters(BF16, SHAPES)
        optimizer = build("adam", params, precision=policy, executor=executor, stats_every=1, global_clipnorm=0.5, clipvalue=0.1)
        steps(optimizer, params, range(3))
        found.append((snapshot(optimizer, params), optimizer.last_stats()))
    assert_same(found[0][0], found[1][0])
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-12)


@pytest.mark.parametrize("cls", ["Adam", "Adamax"])
def test_conversion_to_keras_knows_float32_only(cls: str) -> None:
    """Adamax is known by all its group's keys."""
    for policy in ("float32", "bf16_split"):
        params = parameters(BF16)
        optimizer = getattr(torch_optim, cls)([(f"p{i}", p) for i, p in enumerate(params)], precision=policy)
        steps(optimizer, params, [0])
        if policy == "float32":
            assert checkpoint.from_state_dict(optimizer.state_dict()).class_name == cls
        else:
            with pytest.raises(CheckpointError, match=r"has nothing like torch.optim's \{'precision': 'bf16_split'\}"):
                checkpoint.from_state_dict(optimizer.state_dict())
