"""Names and serialized dicts: always an Optimizer, never an import."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_config import SIGNATURES, every_class, make

from fused_kopt import SGD, Adam, Lion, optimizers
from fused_kopt.optimizer import Optimizer
from fused_kopt.optimizers import registry, schedules

# What loading code, starting programs or opening files would raise. Compiled regexes and formats are not among them.
FORBIDDEN = {"import", "exec", "compile", "marshal.loads", "open", "os.system", "subprocess.Popen", "socket.connect", "pickle.find_class"}
_events: list[tuple[str, str]] = []
_recording = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _recording and event in FORBIDDEN:
        _events.append((event, repr(arguments[:1])))


sys.addaudithook(_hook)  # hooks cannot be removed: one for the process, off except inside `untouched`


@contextmanager
def untouched() -> Iterator[None]:
    """Asserts that nothing is imported, compiled, opened or run inside."""
    global _recording
    modules = set(sys.modules)
    _events.clear()
    _recording = True
    try:
        yield
    finally:
        _recording = False
    assert (_events, set(sys.modules) - modules) == ([], set())


@pytest.mark.parametrize("spell", [str, str.lower, str.upper, str.swapcase])
@every_class
def test_get_by_name(name: str, spell: Any) -> None:
    with untouched():
        optimizer = optimizers.get(spell(name))
    assert type(optimizer) is getattr(optimizers, name)
    assert optimizer.get_config() == make(name).get_config()


FULLWIDTH, LONG_S = "\uff41dam", "\u017fgd"  # which NFKC or upper() would turn into adam and SGD
UNKNOWN = ["", "adam ", " adam", "rms_prop", "adamw", "os.system", "Optimizer", "fused_kopt.Adam", "ExponentialDecay", FULLWIDTH, LONG_S]


def deserialize_default(name: str) -> Optimizer:
    return optimizers.deserialize({"class_name": name, "config": {}})


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("call", [optimizers.get, deserialize_default])
def test_unknown_names(call: Any, name: str) -> None:
    with untouched(), pytest.raises(ValueError, match=r"Unknown optimizer: .*one of adadelta, adagrad, adam,.*sgd, registered"):
        call(name)


NO_IDENTIFIERS = [None, 3, 0.5, Adam, b"adam", ["adam"], {"adam"}, deserialize_default, torch.optim.Adam, object()]


@pytest.mark.parametrize("identifier", NO_IDENTIFIERS, ids=range(10))
def test_get_refuses_what_is_no_identifier(identifier: Any) -> None:
    with pytest.raises(ValueError, match=r"Could not interpret optimizer identifier: .*Pass a name"):
        optimizers.get(identifier)


@every_class
def test_get_returns_an_instance_itself(name: str) -> None:
    optimizer = make(name)
    assert optimizers.get(optimizer) is optimizer


@pytest.mark.parametrize("live", [False, True])
@every_class
def test_serialize_and_back(name: str, live: bool) -> None:
    optimizer = make(name, 0.25, clipvalue=3.0)
    if live:
        optimizer.apply_gradients([(torch.ones(2), torch.ones(2))])
    form = optimizers.serialize(optimizer)
    assert list(form) == ["module", "class_name", "config", "registered_name"]
    assert (form["module"], form["class_name"], form["registered_name"]) == ("fused_kopt.optimizers", name, None)
    assert form["config"] == optimizer.get_config()
    form = json.loads(json.dumps(form))
    before = json.dumps(form)
    short = {key: form[key] for key in ("class_name", "config")}
    for back in (optimizers.deserialize(form), optimizers.get(form), optimizers.deserialize(short)):
        assert (type(back), back.get_config()) == (type(optimizer), form["config"])
        assert back.weights == []
    assert json.dumps(form) == before


@pytest.mark.parametrize("module", ["keras.optimizers.legacy", "keras.optimizers", "builtins", None])
def test_a_form_that_keras_wrote(module: str | None) -> None:
    form = {"module": module, "class_name": "RMSprop", "config": {"name": "RMSprop", "learning_rate": 0.5}, "registered_name": None}
    assert optimizers.deserialize(form).get_config()["learning_rate"] == 0.5


@pytest.mark.parametrize("missing", ["class_name", "config"])
def test_both_keys_are_needed(missing: str) -> None:
    form = {"class_name": "SGD", "config": {}}
    del form[missing]
    with pytest.raises(KeyError, match=missing):
        optimizers.deserialize(form)


@pytest.mark.parametrize("value", [None, 3, "Adam", {"class_name": "Adam", "config": {}}, Adam], ids=range(5))
def test_serialize_refuses_what_is_no_optimizer(value: Any) -> None:
    with pytest.raises(TypeError, match="Only optimizers can be serialized"):
        optimizers.serialize(value)


class Halving(schedules.LearningRateSchedule):
    def __init__(self, start: float) -> None:
        self.start = start

    def __call__(self, step: Any) -> torch.Tensor:
        return self.start * 0.5**step

    def get_config(self) -> dict[str, Any]:
        return {"start": self.start}


class Half(SGD):
    """A custom optimizer."""


@pytest.mark.parametrize("known", [{"Half": Half, "Halving": Halving}, {"half": Half, "Halving": Halving}], ids=["Half", "half"])
def test_custom_objects(known: dict[str, Any]) -> None:
    form = json.loads(json.dumps(optimizers.serialize(Half(Halving(0.5)))))
    back = optimizers.deserialize(form, custom_objects=known)
    assert (type(back), type(back.learning_rate), back.learning_rate.start) == (Half, Halving, 0.5)
    with pytest.raises(ValueError, match="Unknown optimizer: 'Half'"):
        optimizers.deserialize(form)
    with pytest.raises(ValueError, match="Unknown schedule: 'Halving'"):
        optimizers.deserialize(form, custom_objects={"Half": Half})


@pytest.mark.parametrize("value", [None, "Adam", torch.optim.Adam, dict, Halving, optimizers.get, Adam()], ids=range(7))
def test_custom_objects_that_are_no_optimizer_class(value: Any) -> None:
    with pytest.raises(ValueError, match="Unknown optimizer: 'Half'"):
        optimizers.deserialize({"class_name": "Half", "config": {}}, custom_objects={"Half": value})


def test_register(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    assert optimizers.register(Half) is Half
    assert optimizers.register(Half) is Half
    assert type(optimizers.get("HALF")) is Half
    assert type(optimizers.deserialize(optimizers.serialize(Half(0.5)))) is Half
    taken = type("Adam", (Lion,), {})
    with pytest.raises(ValueError, match=r"The name 'Adam' is taken by fused_kopt\.optimizers\.adam\.Adam\. Rename"):
        optimizers.register(taken)
    for wrong in (torch.optim.SGD, Adam(), "Adam", Halving):
        with pytest.raises(TypeError, match="Only subclasses of fused_kopt"):
            optimizers.register(wrong)
    assert type(optimizers.get("adam")) is Adam


COMMAND = {"module": "os", "class_name": "system", "config": {"command": "true"}}
HOSTILE: list[Any] = [
    COMMAND,
    {"module": "os", "class_name": "system", "config": "true", "registered_name": "os>system"},
    {"module": "builtins", "class_name": "eval", "config": {"source": "1"}},
    {"module": "antigravity", "class_name": "Adam", "config": {"learning_rate": {"module": "this", "class_name": "s", "config": {}}}},
    {"module": "os", "class_name": "SGD", "config": {"learning_rate": COMMAND}},
    {"class_name": "SGD", "config": {"learning_rate": {"class_name": "function", "config": "lambda: 1"}}},
    {"class_name": "__lambda__", "config": {"value": "4wEAAAA="}},
    {"class_name": "Adam", "config": {"name": "x", "__reduce__": ["os.system", "true"]}},
    {"class_name": "Adam", "config": [["learning_rate", 0.5]]},
    {"class_name": {"class_name": "Adam"}, "config": {}},
    {"class_name": ["os", "system"], "config": {}},
    {"class_name": "Adam", "config": {1: 2}},
]


@pytest.mark.parametrize("form", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_forms(form: Any) -> None:
    with untouched(), pytest.raises((ValueError, TypeError)):
        optimizers.get(form)
    with untouched(), pytest.raises((ValueError, TypeError)):
        optimizers.get(json.loads(json.dumps(form)))


NAMES = ["os", "system", "eval", "Popen", "pickle", "loads", "this", *SIGNATURES, "ExponentialDecay", "__tensor__"]
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from(NAMES))
KEYS = st.sampled_from(["module", "class_name", "config", "registered_name", "learning_rate", "lr", "name", "decay", "value", "dtype"])
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=8)
FORM = {"class_name": st.sampled_from(NAMES) | VALUES, "config": st.dictionaries(KEYS, VALUES, max_size=4)}


@pytest.mark.filterwarnings("ignore")  # of lr, and of rates that float32 cannot hold
@settings(max_examples=300, deadline=None)
@given(st.fixed_dictionaries(FORM, optional={"module": SCALARS}))
def test_fuzzed_forms_give_an_optimizer_or_an_error(form: dict[str, Any]) -> None:
    with untouched():
        try:
            result = optimizers.deserialize(form)
        except (ValueError, TypeError, KeyError, OverflowError):
            return
    assert isinstance(result, Optimizer)
    assert type(result).__name__ in SIGNATURES


def test_nothing_is_imported_even_the_first_time() -> None:
    # a fresh process: earlier tests may have imported what a form names
    code = """
import sys, fused_kopt
before = set(sys.modules)
for form in ({"module": "antigravity", "class_name": "fly", "config": {}}, {"module": "this", "class_name": "SGD", "config": {}}, "ADAM"):
    try:
        print(type(fused_kopt.optimizers.get(form)).__name__)
    except ValueError as error:
        print(error.args[0][:26])
print(sorted(set(sys.modules) - before), "triton" in sys.modules)
"""
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == ["Unknown optimizer: 'fly'. ", "SGD", "Adam", "[] False"]
