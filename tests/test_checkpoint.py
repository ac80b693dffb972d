"""save and load: bit-equal resumption in another process, whole files or none, and refusals that change nothing."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from support import DTYPES, RULES, assert_same, build, python, randn, state
from torch import Tensor

import fused_kopt
from fused_kopt import checkpoint, distributed
from fused_kopt.errors import CheckpointError
from fused_kopt.optimizers import schedules

SHAPES = ((3, 5), (7,), (), (0, 2))
Named = list[tuple[str, Tensor]]


def variables(dtype: torch.dtype = torch.float32) -> Named:
    return [(f"layer.{i}", randn(*shape, seed=i, dtype=dtype)) for i, shape in enumerate(SHAPES)]


def train(optimizer: Any, named: Named, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.apply_gradients([(randn(*v.shape, seed=100 * step + i, dtype=v.dtype), v) for i, (_, v) in enumerate(named)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_run_is_the_same_run(rule: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path, named, optimizer = tmp_path / "run.safetensors", variables(dtype), build(rule)
    train(optimizer, named, 0, 3)
    optimizer.learning_rate = 0.03  # a callback's, say
    checkpoint.save(path, optimizer, named, with_values=True)
    train(optimizer, named, 3, 6)
    resumed, fresh = build(rule), [(name, torch.zeros_like(v)) for name, v in named]
    checkpoint.load(path, resumed, reversed(fresh), with_values=True)
    train(resumed, fresh, 3, 6)
    assert_same(state(resumed, [v for _, v in fresh]), state(optimizer, [v for _, v in named]))


SCRIPT = """
import sys, torch
from support import bits
from test_checkpoint import *
optimizer, named = scheduled(), variables()
if sys.argv[2] == "resume":
    checkpoint.load(sys.argv[1], optimizer, named, with_values=True)
    train(optimizer, named, 4, 8)
else:
    train(optimizer, named, 0, 4 if sys.argv[2] == "save" else 8)
    checkpoint.save(sys.argv[1], optimizer, named, with_values=True) if sys.argv[2] == "save" else None
print([bits(t).tolist() for t in (*optimizer.weights, *(v for _, v in named))])
"""


def scheduled() -> Any:
    return fused_kopt.Adam(schedules.CosineDecay(0.1, 20), decay=0.01, amsgrad=True)


def test_save_in_one_process_resume_in_another(tmp_path: Path) -> None:
    path = str(tmp_path / "run.safetensors")
    python(SCRIPT, path, "save")
    assert python(SCRIPT, path, "resume") == python(SCRIPT, path, "whole")


KILLED = """
import sys, time, torch
from support import bits
from test_checkpoint import *
import fused_kopt.checkpoint.storage as storage
optimizer, named = build("adam"), variables()
train(optimizer, named, 0, 5)
def stuck(path, flags):
    print("written", flush=True)
    time.sleep(60)
storage.sync = stuck
checkpoint.save(sys.argv[1], optimizer, named)
"""


def test_a_kill_during_save_leaves_the_old_file(tmp_path: Path) -> None:
    path, optimizer, named = tmp_path / "run.safetensors", build("adam"), variables()
    train(optimizer, named, 0, 2)
    checkpoint.save(path, optimizer, named)
    before = path.read_bytes()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], env=env, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "written\n"
    child.kill()
    child.wait()
    child.stdout.close()
    assert path.read_bytes() == before
    checkpoint.load(path, build("adam"), named)


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    path, optimizer, named = tmp_path / "run.safetensors", build("adam"), variables()
    optimizer.get_config = lambda: {"learning_rate": object()}
    with pytest.raises(CheckpointError, match="cannot be written as JSON"):
        checkpoint.save(path, optimizer, named)
    with pytest.raises(FileNotFoundError):
        checkpoint.save(tmp_path / "absent" / "run.safetensors", build("adam"), named)
    assert list(tmp_path.iterdir()) == []


FLOATS = st.sampled_from(DTYPES)
SHAPE = st.lists(st.integers(0, 4), max_size=3).map(tuple)
VARIABLES = st.dictionaries(st.text(max_size=12), st.tuples(SHAPE, FLOATS), max_size=5)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=VARIABLES, rule=st.sampled_from(list(RULES)), steps=st.integers(0, 2))
def test_round_trip(drawn: dict[str, tuple[tuple[int, ...], torch.dtype]], rule: str, steps: int, tmp_path: Path) -> None:
    named = [(name, randn(*shape, seed=i, dtype=dtype)) for i, (name, (shape, dtype)) in enumerate(drawn.items())]
    optimizer, path = build(rule), tmp_path / "run.safetensors"
    train(optimizer, named if named else [], 0, steps if named else 0)
    checkpoint.save(path, optimizer, named, with_values=True)
    resumed, fresh = build(rule), [(name, torch.zeros_like(v)) for name, v in named]
    checkpoint.load(path, resumed, fresh, with_values=True)
    assert resumed.get_slot_names() == optimizer.get_slot_names()
    assert int(resumed.iterations) == int(optimizer.iterations)
    assert_same(state(resumed, [v for _, v in fresh]), state(optimizer, [v for _, v in named]))


def test_variables_without_a_gradient_have_no_slots_after_it_either(tmp_path: Path) -> None:
    path, optimizer, named = tmp_path / "run.safetensors", build("adam"), variables()
    train(optimizer, named[1:3], 0, 2)
    checkpoint.save(path, optimizer, named)
    resumed = build("adam")
    checkpoint.load(path, resumed, named)
    assert_same(state(resumed, []), state(optimizer, []))
    with pytest.raises(KeyError):
        resumed.get_slot(named[0][1], "m")


def test_multipliers_and_own_callables(tmp_path: Path) -> None:
    path, optimizer, named = tmp_path / "run.safetensors", build("momentum"), variables()
    optimizer.scale_learning_rate([named[0][1]], 0.5)
    train(optimizer, named, 0, 2)
    checkpoint.save(path, optimizer, named)
    resumed = build("momentum", learning_rate=lambda: 0.01)
    checkpoint.load(path, resumed, named)
    assert callable(resumed._hyper["learning_rate"])
    assert [m for _, m in resumed._multipliers.values()] == [0.5]
    checkpoint.load(path, kept := build("momentum", learning_rate=0.7), named, settings=False)
    assert kept.learning_rate.item() == pytest.approx(0.7, rel=1e-7)
    assert kept._multipliers == {}


def test_without_state_it_loads_too(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "run.safetensors", build("nadam"), variables())
    checkpoint.load(tmp_path / "run.safetensors", resumed := build("nadam"), variables())
    assert int(resumed.iterations) == 0
    assert len(resumed.weights) == 1


# Refusals. Each row is loaded into an optimizer with state, none of which changes.


def other_names() -> Named:
    return [(f"other.{i}", v) for i, (_, v) in enumerate(variables())]


def other_shapes() -> Named:
    return [(name, torch.ones(2)) for name, _ in variables()]


REFUSED: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "another class": (lambda: build("momentum"), variables, "The checkpoint is of Adam, the optimizer is SGD"),
    "slots that it lacks": (lambda: build("amsgrad"), variables, "Settings that are fixed at construction differ"),
    "a fixed setting": (lambda: build("adam", epsilon=0.5), variables, "epsilon"),
    "another clip": (lambda: build("adam", clipnorm=0.5), variables, "clipnorm"),
    "other names": (lambda: build("adam"), other_names, "other.0"),
    "fewer variables": (lambda: build("adam"), lambda: variables()[1:], "layer.0"),
    "other shapes": (lambda: build("adam"), other_shapes, r"m of layer.0"),
    "narrower slots": (lambda: build("adam"), variables, "float64"),
    "no values": (lambda: build("adam"), variables, "values do not fit"),
}


@pytest.mark.parametrize("row", REFUSED)
def test_what_does_not_fit_changes_nothing(row: str, tmp_path: Path) -> None:
    make, names, message = REFUSED[row]
    path, source, optimizer, named = tmp_path / "run.safetensors", build("adam"), make(), names()
    trained = variables(torch.float64 if row == "narrower slots" else torch.float32)
    train(source, trained, 0, 2)
    checkpoint.save(path, source, trained)
    train(optimizer, named, 0, 1)
    before, config = state(optimizer, [v for _, v in named]), optimizer.get_config()
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(path, optimizer, named, with_values=row == "no values")
    assert_same(state(optimizer, [v for _, v in named]), before)
    assert optimizer.get_config() == config
    with pytest.raises(CheckpointError, match=message):  # nor are slots made
        checkpoint.load(path, unbuilt := make(), named, with_values=row == "no values")
    assert unbuilt.weights == []


def test_slots_that_differ_are_named(tmp_path: Path) -> None:
    path, source, named = tmp_path / "run.safetensors", build("adam"), variables()
    train(source, named, 0, 1)
    checkpoint.save(path, source, named)
    with pytest.raises(CheckpointError, match="vhat of layer"):
        checkpoint.load(path, build("amsgrad"), named, settings=False)


MALFORMED: dict[str, tuple[Any, type[Exception], str]] = {
    "no pairs": ([torch.ones(1)], TypeError, r"must be \(name, tensor\) pairs"),
    "a name twice": ([("a", torch.ones(1)), ("a", torch.ones(1))], ValueError, "'a' twice"),
    "a tensor twice": ([("a", t := torch.ones(1)), ("b", t)], ValueError, "one tensor under two names"),
    "unnamed slots": ([], ValueError, "has slots for variables that `variables` does not name"),
}


@pytest.mark.parametrize("row", MALFORMED)
def test_malformed_variables(row: str, tmp_path: Path) -> None:
    given, error, message = MALFORMED[row]
    optimizer = build("adam")
    train(optimizer, variables(), 0, 1)
    with pytest.raises(error, match=message):
        checkpoint.save(tmp_path / "run.safetensors", optimizer, given)


def test_a_torn_optimizer_is_not_saved(tmp_path: Path) -> None:
    optimizer = build("adam")
    optimizer._torn = True
    with pytest.raises(fused_kopt.TornStepError, match="interrupted"):
        checkpoint.save(tmp_path / "run.safetensors", optimizer, [])


@pytest.mark.parametrize("saved", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("loaded", [torch.contiguous_format, torch.channels_last])
def test_scales_belong_to_an_order_in_memory(saved: torch.memory_format, loaded: torch.memory_format, tmp_path: Path) -> None:
    gradient = torch.randn(8, 4, 5, 5, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 8).view(8, 1, 1, 1)
    first, second = (torch.ones(8, 4, 5, 5).bfloat16().contiguous(memory_format=how) for how in (saved, loaded))
    optimizer, resumed = (fused_kopt.Adam(precision="bf16_8bit") for _ in range(2))
    optimizer.apply_gradients([(gradient.bfloat16(), first)])
    checkpoint.save(tmp_path / "run.safetensors", optimizer, {"v": first})
    if saved == loaded:
        checkpoint.load(tmp_path / "run.safetensors", resumed, {"v": second})
        assert torch.equal(resumed.get_slot(second, "m"), optimizer.get_slot(first, "m"))
    else:
        with pytest.raises(CheckpointError, match="order in memory"):
            checkpoint.load(tmp_path / "run.safetensors", resumed, {"v": second})
        assert resumed.weights == []


def test_a_sharded_optimizer_is_sent_to_distributed(tmp_path: Path) -> None:
    path, optimizer, named = tmp_path / "run.safetensors", distributed.shard(build("adam")), variables()
    with pytest.raises(ValueError, match=r"fused_kopt\.distributed\.save"):
        checkpoint.save(path, optimizer, named)
    checkpoint.save(path, build("adam"), named)
    with pytest.raises(ValueError, match=r"fused_kopt\.distributed\.load"):
        checkpoint.load(path, optimizer, named)
    assert optimizer.weights == []


def test_a_checkpoint_mends_a_torn_optimizer(tmp_path: Path) -> None:
    path, optimizer, named = tmp_path / "run.safetensors", build("adam"), variables()
    train(optimizer, named, 0, 2)
    checkpoint.save(path, optimizer, named)
    optimizer._torn = True
    with pytest.raises(CheckpointError):
        checkpoint.load(path, optimizer, {})
    assert optimizer._torn
    checkpoint.load(path, optimizer, named)
    train(optimizer, named, 2, 3)
    assert int(optimizer.iterations) == 3


# Damaged and forged files.


def forged(change: Callable[[dict[str, Any], dict[str, Tensor], dict[str, str]], object]) -> Callable[[Path], None]:
    """Rewrites a file after a change of its schema, its tensors or its metadata."""

    def damage(path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        schema = json.loads(metadata["checkpoint"])
        metadata.pop("checkpoint")
        change(schema, tensors, metadata)
        metadata.setdefault("checkpoint", json.dumps(schema))
        save_file(tensors, path, metadata)

    return damage


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "not a readable safetensors file"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-7]), "not a readable safetensors file"),
    "noise": (lambda path: path.write_bytes(bytes(range(256)) * 9), "not a readable safetensors file"),
    "another writer": (forged(lambda s, t, m: m.update(format="pt")), "was not written by fused_kopt"),
    "a later version": (forged(lambda s, t, m: m.update(version="2")), "version '2'"),
    "no JSON": (forged(lambda s, t, m: m.update(checkpoint="{")), "not a readable"),
    "deep JSON": (forged(lambda s, t, m: m.update(checkpoint="[" * 100_000)), "not a readable"),
    "another JSON": (forged(lambda s, t, m: m.update(checkpoint="[]")), "not a JSON object"),
    "a key too few": (forged(lambda s, t, m: s.pop("config")), "config"),
    "a key too many": (forged(lambda s, t, m: s.update(other=1)), "other"),
    "no count": (forged(lambda s, t, m: s.update(iterations=True)), "iterations"),
    "a negative count": (forged(lambda s, t, m: s.update(iterations=-1)), "iterations"),
    "an unknown source": (forged(lambda s, t, m: s.update(source="elsewhere")), "source"),
    "a tensor too few": (forged(lambda s, t, m: t.pop("slot/m/layer.0")), "not those of the file's own schema"),
    "a tensor too many": (forged(lambda s, t, m: t.update(other=torch.ones(1))), "not those of the file's own schema"),
    "a slot twice": (forged(lambda s, t, m: s["slots"]["layer.0"].append("m")), "names a tensor twice"),
    "another shape": (forged(lambda s, t, m: t.update({"slot/m/layer.0": torch.ones(4)})), "m of layer.0"),
    "integers": (forged(lambda s, t, m: t.update({"slot/m/layer.0": torch.ones(3, 5, dtype=torch.int32)})), "int32"),
    "an unknown slot": (forged(lambda s, t, m: (s["slots"]["layer.1"].append("x"), t.update({"slot/x/layer.1": torch.ones(7)}))), "x of"),
    "an unknown weight": (forged(lambda s, t, m: (s["extra"].append("cache"), t.update({"extra/cache": torch.ones(())}))), "cache"),
    "another class": (forged(lambda s, t, m: s.update(class_name="Nobody")), "is of Nobody"),
    "an unknown setting": (forged(lambda s, t, m: s["config"].update(other=1)), "other"),
    "a setting of no kind": (forged(lambda s, t, m: s["config"].update(beta_1="x")), "do not fit Adam"),
    "an unknown schedule": (forged(lambda s, t, m: s["config"].update(learning_rate={"class_name": "os"})), "do not fit Adam"),
    "a bad multiplier": (forged(lambda s, t, m: s["overrides"].update({"layer.0": {"learning_rate_multiplier": -1.0}})), "multiplier"),
    "a stranger's multiplier": (forged(lambda s, t, m: s["overrides"].update(x={"learning_rate_multiplier": 1.0})), "multiplier"),
}


@pytest.mark.parametrize("row", DAMAGE)
def test_damaged_and_forged_files(row: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[row]
    path, optimizer, named = tmp_path / "run.safetensors", build("adam"), variables()
    train(optimizer, named, 0, 2)
    checkpoint.save(path, optimizer, named)
    damage(path)
    before = state(optimizer, [v for _, v in named])
    for target in (optimizer, build("adam")):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(path, target, named)
        assert_same(state(optimizer, [v for _, v in named]), before)
    assert target.weights == []


def test_importing_the_package_imports_no_extra() -> None:
    code = "import sys, fused_kopt, fused_kopt.cli; print([m for m in ('safetensors', 'h5py', 'keras') if m in sys.modules])"
    assert python(code) == "[]\n"
