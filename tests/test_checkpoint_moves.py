"""Runs that move: from TensorFlow bit for bit, from Keras 3 within its rounding. Recorded by golden/make_moves.py."""

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from golden.draw import Case, steps
from golden.moves import FILED, FILES, HALF, LISTED, LISTS, VARIABLES, WHOLE
from torch import Tensor

import fused_kopt
from fused_kopt import checkpoint
from fused_kopt.checkpoint import Checkpoint, Hints
from fused_kopt.errors import CheckpointError

Named = list[tuple[str, Tensor]]
# Keras's variables and numpy 2 disagree about a keyword of __array__; Keras's own code meets it when it saves.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    with np.load(LISTS) as file:
        return {name: file[name] for name in file.files}


def values(recorded: dict[str, np.ndarray], case: Case, kind: str, step: int) -> list[np.ndarray]:
    prefix = f"{case.name}/{kind}/{step}/"
    return [recorded[f"{prefix}{i}"] for i in range(sum(name.startswith(prefix) for name in recorded))]


def variables(recorded: dict[str, np.ndarray], case: Case) -> Named:
    names = VARIABLES if case in FILED else [f"v{i}" for i in range(len(case.shapes))]
    return list(zip(names, map(torch.tensor, values(recorded, case, "variable", HALF)), strict=True))


def goes_on(recorded: dict[str, np.ndarray], case: Case, optimizer: Any, named: Named) -> None:
    """The rest of the run equals TensorFlow's, variables and weights, bit for bit."""
    for number, pairs in enumerate(steps(case), start=1):
        if number > HALF:
            optimizer.apply_gradients([(torch.tensor(gradient), named[index][1]) for gradient, index in pairs])
    for found, expected in ((named, "variable"), (list(enumerate(optimizer.get_weights())), "weight")):
        wanted = values(recorded, case, expected, WHOLE)
        assert [name for (name, value), other in zip(found, wanted, strict=True) if not np.array_equal(value, other)] == []


@pytest.mark.parametrize("case", LISTED, ids=lambda case: case.name)
def test_a_tensorflow_run_goes_on_from_get_weights(case: Case, recorded: dict[str, np.ndarray]) -> None:
    named, weights = variables(recorded, case), values(recorded, case, "weight", HALF)
    moved = checkpoint.from_weights(weights, {"class_name": case.optimizer, "config": case.config}, named)
    optimizer = checkpoint.new_optimizer(moved)
    checkpoint.restore(moved, optimizer, named)
    goes_on(recorded, case, optimizer, named)


@pytest.mark.parametrize("case", FILED, ids=lambda case: case.name)
def test_a_tensorflow_run_goes_on_from_its_h5_file(case: Case, recorded: dict[str, np.ndarray], tmp_path: Path) -> None:
    read = checkpoint.read(FILES / f"{case.name}.h5")
    checkpoint.write(tmp_path / "moved.safetensors", read)  # by way of a file of ours
    moved = checkpoint.read(tmp_path / "moved.safetensors")
    named = [(name, torch.zeros(shape)) for name, shape in VARIABLES.items()]
    optimizer = checkpoint.new_optimizer(moved)
    checkpoint.restore(moved, optimizer, reversed(named), with_values=True)  # by name: the order does not matter
    goes_on(recorded, case, optimizer, named)
    assert [name for name, values in moved.slots.items() if values] == list(VARIABLES)


@pytest.mark.parametrize("case", LISTED, ids=lambda case: case.name)
def test_get_weights_in_and_out(case: Case, recorded: dict[str, np.ndarray]) -> None:
    weights = values(recorded, case, "weight", WHOLE)
    again = checkpoint.to_weights(checkpoint.from_weights(weights, {"class_name": case.optimizer, "config": case.config}, names(case)))
    assert [(value.dtype, value.tobytes()) for value in again] == [(value.dtype, value.tobytes()) for value in weights]


def names(case: Case) -> list[str]:
    return [f"v{i}" for i in range(len(case.shapes))]


@pytest.mark.parametrize("case", FILED, ids=lambda case: case.name)
def test_back_into_a_file_of_tensorflow(case: Case, recorded: dict[str, np.ndarray], tmp_path: Path) -> None:
    """What fused_kopt trained on is in the file, dataset by dataset, and nothing else has changed."""
    target = tmp_path / "model.h5"
    target.write_bytes((FILES / f"{case.name}.h5").read_bytes())
    order = list(VARIABLES)
    identity = {"class_name": case.optimizer, "config": case.config}
    later = checkpoint.from_weights(values(recorded, case, "weight", WHOLE), identity, order)
    checkpoint.write(target, later)
    with h5py.File(target) as new, h5py.File(FILES / f"{case.name}.h5") as old:
        weight_names = list(old["optimizer_weights"].attrs["weight_names"])
        assert list(new["optimizer_weights"].attrs["weight_names"]) == weight_names
        for name, expected in zip(weight_names, values(recorded, case, "weight", WHOLE), strict=True):
            assert np.array_equal(new["optimizer_weights"][name][()], expected)
        assert new.attrs["model_config"] == old.attrs["model_config"]
        assert np.array_equal(new["model_weights/first/first/kernel:0"], old["model_weights/first/first/kernel:0"])
    assert list(tmp_path.iterdir()) == [target]


# Keras 3, the installed one. Its files are made here, by its torch backend.


@pytest.fixture(scope="module")
def keras() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "torch")
        import keras

        yield keras


STOCK: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"learning_rate": 0.05}),
    "momentum": ("SGD", {"learning_rate": 0.05, "momentum": 0.9}),
    "nesterov": ("SGD", {"learning_rate": 0.05, "momentum": 0.9, "nesterov": True}),
    "rmsprop": ("RMSprop", {"momentum": 0.7, "centered": True}),
    "adam": ("Adam", {"learning_rate": 0.01}),
    "amsgrad": ("Adam", {"learning_rate": 0.01, "amsgrad": True}),
    "adadelta": ("Adadelta", {"learning_rate": 0.7}),
    "adagrad": ("Adagrad", {"learning_rate": 0.1}),
    "adamax": ("Adamax", {"learning_rate": 0.01}),
    "nadam": ("Nadam", {"learning_rate": 0.01}),
    "ftrl": ("Ftrl", {"learning_rate": 0.2, "l1_regularization_strength": 0.02}),
    "lion": ("Lion", {"learning_rate": 0.01, "beta_2": 0.95}),
}
each_stock = pytest.mark.parametrize("stock", STOCK)


class Run:
    """A Keras model and the gradients of its run."""

    def __init__(self, keras: Any, stock: str, **options: Any) -> None:
        cls, config = STOCK[stock]
        self.model = keras.Sequential([keras.layers.Dense(3, name="first"), keras.layers.Dense(2, name="second")], name="net")
        self.model.build((None, 4))
        self.optimizer = getattr(keras.optimizers, cls)(**{**config, **options})
        self.model.compile(optimizer=self.optimizer, loss=keras.losses.MeanSquaredError())
        self.optimizer.build(self.model.trainable_variables)
        self.random = torch.Generator().manual_seed(1)

    def gradients(self) -> list[Tensor]:
        return [torch.randn(tuple(v.shape), generator=self.random) for v in self.model.trainable_variables]

    def train(self, count: int) -> None:
        for _ in range(count):
            self.optimizer.apply(self.gradients(), self.model.trainable_variables)

    def copies(self) -> Named:
        return [(v.path, v.value.detach().clone()) for v in self.model.trainable_variables]

    def weights(self) -> list[np.ndarray]:
        return [np.asarray(v.value.detach()) for v in self.optimizer.variables]

    def file(self, folder: Path, suffix: str) -> Path:
        path = folder / f"run{suffix}"
        self.model.save_weights(path) if suffix == ".weights.h5" else self.model.save(path)
        return path


# Keras itself calls its .h5 files legacy when it writes them.
legacy = pytest.mark.filterwarnings("ignore:.*HDF5.*")
each_file = pytest.mark.parametrize("suffix", [".keras", ".weights.h5", pytest.param(".h5", marks=legacy)])


def read(path: Path, run: Run, stock: str) -> Checkpoint:
    cls = STOCK[stock][0]
    order = [v.path for v in run.model.trainable_variables]
    return checkpoint.read(path, Hints(order, {"class_name": cls, "config": run.optimizer.get_config()}))


def close(found: Named, expected: Named) -> None:
    # Keras 3 keeps 1 - beta in double precision where OptimizerV2 rounds it: 7e-6 of a step (keras-semantics.md 9.1)
    for (name, value), (_, other) in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=2e-5, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


@each_file
@pytest.mark.parametrize("stock", ["sgd", "momentum", "nesterov", "adam", "amsgrad", "adamax", "nadam", "adadelta", "ftrl"])
def test_a_keras_3_run_goes_on(keras: Any, stock: str, suffix: str, tmp_path: Path) -> None:
    run = Run(keras, stock)
    run.train(6)
    moved = read(run.file(tmp_path, suffix), run, stock)
    named = run.copies()
    optimizer = checkpoint.new_optimizer(moved)
    checkpoint.restore(moved, optimizer, named)
    fresh, started = getattr(fused_kopt, STOCK[stock][0])(**STOCK[stock][1]), run.copies()
    for _ in range(6):
        gradients = run.gradients()
        run.optimizer.apply(gradients, run.model.trainable_variables)
        optimizer.apply_gradients(list(zip(gradients, (v for _, v in named), strict=True)))
        fresh.apply_gradients(list(zip(gradients, (v for _, v in started), strict=True)))
    close(named, run.copies())
    assert int(optimizer.iterations) == 12
    if stock != "sgd":  # the control: without the state the run goes elsewhere
        with pytest.raises(AssertionError):
            close(started, run.copies())


@each_file
@each_stock
def test_keras_3_files_in_and_out(keras: Any, stock: str, suffix: str, tmp_path: Path) -> None:
    """All that Keras kept is read, and goes back into another run's file, from which Keras itself goes on."""
    run, other = Run(keras, stock), Run(keras, stock)
    run.train(4)
    other.train(1)
    moved = read(run.file(tmp_path, suffix), run, stock)
    assert moved.iterations == 4
    order = [v.path for v in run.model.trainable_variables]
    again = checkpoint.to_keras3(moved, run.optimizer.get_config(), order)
    assert [value.tobytes() for value in again[1:]] == [value.tobytes() for value in run.weights()[1:]]
    target = other.file(tmp_path, suffix)
    checkpoint.write(target, moved, Hints(order))
    if suffix == ".weights.h5":
        other.model.load_weights(target)
        assert [v.tobytes() for v in other.weights()] == [v.tobytes() for v in run.weights()]
    elif suffix == ".keras":
        loaded = keras.models.load_model(target)
        assert [np.asarray(v.value.detach()).tobytes() for v in loaded.optimizer.variables] == [v.tobytes() for v in run.weights()]
    else:
        assert all(torch.equal(a, b) for a, b in tensors(checkpoint.read(target), moved))


def tensors(first: Checkpoint, second: Checkpoint) -> list[tuple[Tensor, Tensor]]:
    assert {name: list(slots) for name, slots in first.slots.items()} == {name: list(slots) for name, slots in second.slots.items()}
    return [(value, second.slots[name][slot]) for name, slots in first.slots.items() for slot, value in slots.items()]


@legacy
def test_what_keras_3_loses_from_its_own_h5_is_rescued(keras: Any, tmp_path: Path) -> None:
    run = Run(keras, "adam")
    run.train(5)
    path = run.file(tmp_path, ".h5")
    lost = keras.models.load_model(path)
    assert len(lost.optimizer.variables) == 2  # Keras: the iterations and the learning rate, no moments
    moved = checkpoint.read(path)
    assert [tuple(slots["m"].shape) for slots in moved.slots.values()] == [(4, 3), (3,), (3, 2), (2,)]
    own = [slots[slot].numpy().tobytes() for slots in moved.slots.values() for slot in ("m", "v")]
    assert own == [value.tobytes() for value in run.weights()[2:]]


def test_averages_accumulators_and_schedules_of_keras_3(keras: Any, tmp_path: Path) -> None:
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.9)
    run = Run(keras, "amsgrad", use_ema=True, gradient_accumulation_steps=2, learning_rate=schedule)
    run.train(3)
    moved = read(run.file(tmp_path, ".keras"), run, "amsgrad")
    assert list(moved.slots["net/first/bias"]) == ["average", "gradient_accumulator", "m", "v", "vhat"]
    assert moved.config["learning_rate"]["class_name"] == "ExponentialDecay"
    again = checkpoint.to_keras3(moved, run.optimizer.get_config())
    assert [value.tobytes() for value in again[1:]] == [value.tobytes() for value in run.weights()[1:]]
    with pytest.raises(CheckpointError, match=r"use_ema|gradient_accumulation_steps"):  # not in OptimizerV2's words
        checkpoint.new_optimizer(moved)


def test_the_inner_optimizer_of_a_loss_scale(keras: Any, tmp_path: Path) -> None:
    run = Run(keras, "adam")
    inner, scaled = run.optimizer, keras.optimizers.LossScaleOptimizer(run.optimizer)
    run.model.compile(optimizer=scaled)
    scaled.build(run.model.trainable_variables)
    for _ in range(3):
        scaled.apply([scaled.scale_loss(g) for g in run.gradients()], run.model.trainable_variables)
    moved = read(run.file(tmp_path, ".keras"), run, "adam")
    assert (moved.class_name, moved.iterations) == ("Adam", 3)
    assert [value.tobytes() for value in checkpoint.to_keras3(moved, inner.get_config())[1:]] == [v.tobytes() for v in run.weights()[1:]]


@pytest.mark.parametrize(
    ("stock", "told"), [("adagrad", "accumulator \\+ epsilon"), ("rmsprop", "sqrt\\(rms \\+ epsilon\\)")], ids=lambda value: value
)
def test_other_update_rules_are_told(keras: Any, stock: str, told: str) -> None:
    run = Run(keras, stock, **({"momentum": 0.0, "centered": False} if stock == "rmsprop" else {}))
    run.train(1)
    moved = checkpoint.from_keras3(run.weights(), STOCK[stock][0], run.optimizer.get_config(), run.copies())
    with pytest.warns(UserWarning, match=told):
        checkpoint.restore(moved, checkpoint.new_optimizer(moved), run.copies())


Forge = Callable[[Path], Any]


def adam(count: int, order: Sequence[str] = ("a", "b")) -> Checkpoint:
    return checkpoint.from_weights([np.int64(1), *(np.ones(2, np.float32) for _ in range(count))], "adam", order)


KERAS3 = {"learning_rate": 0.5, "beta_1": 0.9, "beta_2": 0.99, "use_ema": False}
ROWS: dict[str, tuple[Callable[[], Any], str]] = {
    "a weight too few": (lambda: adam(3), "4 weights; for these variables, in this order, 5 are expected"),
    "a weight too many": (lambda: adam(5), r"\(position 5\)"),
    "another shape": (lambda: checkpoint.from_weights([np.int64(0), np.ones(2), np.ones(2)], "adam", [("a", torch.ones(3))]), r"\(3,\)"),
    "no number": (lambda: checkpoint.from_weights([np.array("x")], "sgd", []), "must be real numbers"),
    "fractional steps": (lambda: checkpoint.from_weights([np.array(1.5)], "sgd", []), "one whole number >= 0"),
    "negative steps": (lambda: checkpoint.from_weights([np.array(-1)], "sgd", []), "one whole number >= 0"),
    "other names": (lambda: checkpoint.to_weights(adam(4), ["a", "c"]), "slots for other variables"),
    "unknown to OptimizerV2": (lambda: checkpoint.from_keras3([], "Muon", KERAS3, ["a"]), "Muon have no counterpart"),
    "a schedule for a rate": (lambda: checkpoint.to_keras3(adam(4), KERAS3 | {"learning_rate": {}}), "cannot become a schedule"),
    "Nadam's other schedule": (
        lambda: checkpoint.to_keras3(checkpoint.from_weights([np.int64(0), np.float32(1)], "nadam", []), KERAS3),
        "schedule_decay=1",
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_refusals_of_lists(row: str) -> None:
    call, message = ROWS[row]
    with pytest.raises(CheckpointError, match=message):
        call()


def _without(path: Path, group: str) -> None:
    with h5py.File(path, "r+") as file:
        del file[group]


def _zipped(path: Path, member: str) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(member, "{}")


def _renamed_weight(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["optimizer_weights"].attrs["weight_names"] = ["Adam/iter:0", "Adam/iter:0"]


def _no_count(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["optimizer_weights"].attrs["weight_names"] = ["Adam/first/bias/m:0"]


def _forged_config(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["training_config"] = "[]"


DAMAGE: dict[str, tuple[str, Forge, str]] = {
    "truncated": ("m.h5", lambda path: path.write_bytes(path.read_bytes()[:900]), "not a readable Keras file"),
    "no file of Keras": ("m.h5", lambda path: path.write_bytes(b"nothing"), "not a readable Keras file"),
    "no optimizer": ("m.h5", lambda path: _without(path, "optimizer_weights"), "has no optimizer state"),
    "names that are not there": ("m.h5", lambda path: _without(path, "optimizer_weights/Adam"), "not a readable Keras file"),
    "a name twice": ("m.h5", _renamed_weight, "names a weight twice"),
    "a forged configuration": ("m.h5", _forged_config, "not a readable Keras file"),
    "no count": ("m.h5", _no_count, "no count of iterations"),
    "no positions": ("m.weights.h5", lambda path: None, r"no optimizer state \(optimizer/vars"),
    "no zip": ("m.keras", lambda path: None, "not a readable .keras file"),
    "an empty zip": ("m.keras", lambda path: _zipped(path, "other"), "not a readable .keras file"),
    "an unknown suffix": ("m.xyz", lambda path: None, "the suffix does not say"),
}


@pytest.mark.parametrize("row", DAMAGE)
def test_damaged_files(row: str, tmp_path: Path) -> None:
    name, damage, message = DAMAGE[row]
    path = tmp_path / name
    path.write_bytes((FILES / "move_h5_adam.h5").read_bytes())
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read(path, Hints(["a"], "adam"))


def test_files_without_what_they_need(tmp_path: Path) -> None:
    path = tmp_path / "weights.npz"
    np.savez(path, np.int64(0))
    with pytest.raises(CheckpointError, match="which optimizer"):
        checkpoint.read(path, Hints(["a"]))
    with pytest.raises(CheckpointError, match="only positions"):
        checkpoint.read(path, Hints(optimizer="adam"))
    with pytest.raises(FileNotFoundError):
        checkpoint.read(tmp_path / "absent.h5")
    with pytest.raises(CheckpointError, match="a checkpoint has no model"):
        checkpoint.write(tmp_path / "absent.h5", adam(4))
    path = tmp_path / "m.h5"
    path.write_bytes((FILES / "move_h5_adam.h5").read_bytes())
    with pytest.raises(CheckpointError, match="is of Adam, the checkpoint of SGD"):
        checkpoint.write(path, checkpoint.from_weights([np.int64(0)], "sgd", []))
    assert path.read_bytes() == (FILES / "move_h5_adam.h5").read_bytes()
