"""compile, fit, callbacks, policies, files and copies with fused_kopt.keras."""

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import stock
import torch
from sklearn.datasets import load_digits

import fused_kopt.keras as fk

X, Y = load_digits(return_X_y=True)
X = (X / 16).astype("float32")[:256]
Y = Y[:256]


@pytest.fixture(autouse=True)
def policy() -> Iterator[None]:
    yield
    keras.config.set_dtype_policy("float32")


def model(optimizer: Any, **options: Any) -> Any:
    keras.utils.set_random_seed(0)
    network = keras.Sequential([keras.Input((64,)), keras.layers.Dense(16, activation="relu"), keras.layers.Dense(10)])
    network.compile(optimizer=optimizer, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), **options)
    return network


def fit(network: Any, **options: Any) -> list[float]:
    """The loss of every batch."""
    losses: list[float] = []
    seen = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: losses.append(logs["loss"]))
    options = {"epochs": 2, "batch_size": 64, "verbose": 0, "shuffle": False, **options}
    network.fit(X, Y, callbacks=[seen, *options.pop("callbacks", [])], **options)
    return losses


def state(network: Any) -> list[np.ndarray]:
    return stock.values([*network.trainable_variables, *network.optimizer.variables])


@pytest.mark.parametrize("case", stock.NAMES)
def test_fit_follows_keras(case: str) -> None:
    first, second = fit(model(stock.ours(case))), fit(model(stock.theirs(case)))
    # variables are 1e-6 apart (test_keras.bound), and a loss of 2 has gradients below 1
    np.testing.assert_allclose(first, second, rtol=1e-5)
    assert max(abs(a - b) for a, b in zip(first[1:], first, strict=False)) > (1e-4 if case == "Adadelta" else 1e-3)


def test_compile_by_name() -> None:
    optimizer = model("fused_kopt>Adam").optimizer
    assert type(optimizer) is fk.Adam
    assert keras.optimizers.get({"class_name": "fused_kopt>Adam", "config": {"learning_rate": 0.25}}).get_config()["learning_rate"] == 0.25
    assert type(keras.optimizers.get("adam")) is type(keras.optimizers.Adam())


@pytest.mark.parametrize("case", stock.CLASSES)
def test_config_and_signature_are_keras_own(case: str) -> None:
    first, second = stock.ours(case, name="o", weight_decay=0.1), stock.theirs(case, name="o", weight_decay=0.1)
    assert first.get_config() == second.get_config()
    assert list(first.get_config()) == list(second.get_config())
    assert isinstance(first, getattr(keras.optimizers, stock.CLASSES[case][0]))
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(first))
    assert type(again) is type(first)
    assert again.get_config() == first.get_config()


@pytest.mark.parametrize("case", stock.NAMES)
def test_variables_have_keras_order_and_names(case: str) -> None:
    options = {"name": "o", "use_ema": True, "gradient_accumulation_steps": 2}
    optimizers = stock.ours(case, **options), stock.theirs(case, **options)
    for optimizer in optimizers:
        optimizer.build(stock.variables())
    # Nadam's product is called "variable" and a running number
    first, second = ([v.path for v in o.variables if v.path.startswith("o/")] for o in optimizers)
    assert first == second
    assert [v.shape for v in optimizers[0].variables] == [v.shape for v in optimizers[1].variables]


CALLBACKS: dict[str, Callable[[], Any]] = {
    "LearningRateScheduler": lambda: keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.05 / (epoch + 1)),
    "ReduceLROnPlateau": lambda: keras.callbacks.ReduceLROnPlateau(monitor="loss", factor=0.1, patience=0, min_delta=10.0),
    "SwapEMAWeights": lambda: keras.callbacks.SwapEMAWeights(swap_on_epoch=True),
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_callbacks(name: str) -> None:
    networks = [model(make("SGD", use_ema=True)) for make in (stock.ours, stock.theirs)]
    first, second = (fit(network, callbacks=[CALLBACKS[name]()]) for network in networks)
    np.testing.assert_allclose(first, second, rtol=1e-5)  # as above
    assert stock.distance(state(networks[0]), state(networks[1])) <= 1e-6


@pytest.mark.parametrize("name", ["mixed_float16", "mixed_bfloat16", "bfloat16"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_policies(name: str, wrapped: bool) -> None:
    keras.config.set_dtype_policy(name)
    optimizer = fk.LossScaleOptimizer(stock.ours("SGD")) if wrapped else stock.ours("SGD")
    network, other = model(optimizer), model(stock.theirs("SGD"))
    inner = type(network.optimizer)
    if wrapped:
        assert inner is fk.LossScaleOptimizer  # not wrapped twice
    else:
        assert inner is (keras.optimizers.LossScaleOptimizer if name == "mixed_float16" else fk.SGD)
    # bfloat16 variables: half an ulp of each step, 2^-9 of the variable; elsewhere they are float32 and activations have 16 bits
    np.testing.assert_allclose(fit(network), fit(other), rtol=2e-2)
    assert {str(v.value.dtype) for v in network.trainable_variables} == {"torch.bfloat16" if name == "bfloat16" else "torch.float32"}


@pytest.mark.parametrize("options", [{"run_eagerly": True}, pytest.param({"jit_compile": True}, marks=pytest.mark.slow)])
def test_ways_to_run(options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.compile's own
        found = fit(model(stock.ours("Adam"), **options), epochs=1)
    np.testing.assert_allclose(found, fit(model(stock.ours("Adam")), epochs=1), rtol=1e-5)  # the model's rounding


WRITERS = {"stock": stock.theirs, "ours": stock.ours, "fused": lambda *a, **k: fk.fuse(stock.theirs(*a, **k))}


@pytest.mark.parametrize("reader", WRITERS)
@pytest.mark.parametrize("writer", WRITERS)
def test_weights_files_are_exchanged(writer: str, reader: str, tmp_path: Path) -> None:
    options = {"use_ema": True, "gradient_accumulation_steps": 2}
    first, second = (model(WRITERS[who]("Nadam", **options)) for who in (writer, reader))
    fit(first, epochs=1)
    first.save_weights(tmp_path / "run.weights.h5")
    second.optimizer.build(second.trainable_variables)
    second.load_weights(tmp_path / "run.weights.h5")
    for a, b in zip(state(first), state(second), strict=True):
        assert np.array_equal(a, b)
    np.testing.assert_allclose(fit(first, epochs=1), fit(second, epochs=1), rtol=1e-5)  # as above


@pytest.mark.parametrize("case", ["Adam", "LossScale"])
def test_keras_files_go_on_to_the_bit(case: str, tmp_path: Path) -> None:
    first = model(stock.ours("Adam") if case == "Adam" else fk.LossScaleOptimizer(stock.ours("Adam"), initial_scale=64.0))
    fit(first, epochs=1)
    first.save(tmp_path / "run.keras")
    second = keras.models.load_model(tmp_path / "run.keras")
    assert type(second.optimizer) is type(first.optimizer)
    assert fit(first, epochs=1) == fit(second, epochs=1)
    for a, b in zip(state(first), state(second), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("case", stock.NAMES)
def test_a_fused_stock_optimizer_stays_keras_own(case: str, tmp_path: Path) -> None:
    plain, fused = stock.theirs(case, name="o"), fk.fuse(stock.theirs(case, name="o"))
    assert fk.fuse(fused) is fused
    assert keras.saving.serialize_keras_object(fused) == keras.saving.serialize_keras_object(plain)
    assert stock.distance(stock.train(fused, 5), stock.train(stock.ours(case), 5)) == 0
    assert "launch" in str(fused.describe())
    network = model(fk.fuse(stock.theirs(case)))
    fit(network, epochs=1)
    network.save(tmp_path / "run.keras")
    again = keras.models.load_model(tmp_path / "run.keras")
    assert type(again.optimizer) is type(plain)
    assert "apply" not in vars(again.optimizer)


def test_a_fused_optimizer_inside_a_loss_scale() -> None:
    optimizer = fk.fuse(keras.optimizers.LossScaleOptimizer(stock.theirs("Adam"), initial_scale=4.0))
    assert "apply" in vars(optimizer.inner_optimizer)
    expected = keras.optimizers.LossScaleOptimizer(stock.theirs("Adam"), initial_scale=4.0)
    assert stock.distance(stock.train(optimizer, 5), stock.train(expected, 5)) <= 1e-6


COPIERS: dict[str, Callable[[Any], Any]] = {"deepcopy": copy.deepcopy, "pickle": lambda value: pickle.loads(pickle.dumps(value))}


@pytest.mark.parametrize("how", COPIERS)
@pytest.mark.parametrize("scaled", [False, True])
def test_a_copy_of_an_optimizer_keeps_its_state(how: str, scaled: bool) -> None:
    def make() -> Any:
        # Keras's LossScaleOptimizer does not list Nadam's product among its variables
        return fk.LossScaleOptimizer(stock.ours("Adam"), initial_scale=2.0) if scaled else stock.ours("Nadam")

    first, trained = make(), stock.variables()
    for step in range(3):
        first.apply(stock.gradients(step), trained)
    second = COPIERS[how](COPIERS[how](first))  # an unbuilt copy is copied too
    others = [keras.Variable(v.numpy(), name=v.name) for v in trained]
    for step in range(3, 6):
        first.apply(stock.gradients(step), trained)
        second.apply(stock.gradients(step), others)
    assert stock.distance(stock.values([*trained, *first.variables]), stock.values([*others, *second.variables])) == 0


@pytest.mark.parametrize("how", COPIERS)
@pytest.mark.parametrize("fused", [False, True])
def test_a_copy_of_a_compiled_model_goes_on(how: str, fused: bool) -> None:
    network = model(fk.fuse(stock.theirs("Adam")) if fused else stock.ours("Adam"))
    fit(network, epochs=1)
    twin = COPIERS[how](network)
    first, second = fit(network, epochs=1), fit(twin, epochs=1)
    np.testing.assert_allclose(first, second, rtol=1e-5 if fused else 0)  # the copy of a fused one is stock
    assert stock.distance(state(network), state(twin)) <= (1e-5 if fused else 0)


def test_loss_scale() -> None:
    """Keras 3's contract, but for the scale's ends."""
    own, theirs = (
        cls(make("Adam"), initial_scale=8.0, dynamic_growth_steps=3)
        for cls, make in ((fk.LossScaleOptimizer, stock.ours), (keras.optimizers.LossScaleOptimizer, stock.theirs))
    )
    outcomes = []
    for optimizer in (own, theirs):
        trained, seen = stock.variables(), []
        for step in range(12):
            grads = [g * optimizer.scale_loss(1.0) for g in stock.gradients(step)]
            if step in (4, 5):
                grads[3][2] = np.inf if step == 4 else np.nan
            optimizer.apply([g.detach() for g in grads], trained)
            seen.append((float(optimizer.dynamic_scale.numpy()), int(optimizer.step_counter.numpy()), int(optimizer.iterations.numpy())))
        outcomes.append((seen, stock.values(trained)))
    assert outcomes[0][0] == outcomes[1][0]
    assert stock.distance(outcomes[0][1], outcomes[1][1]) <= 4e-6  # test_keras.bound


def test_the_loss_scale_has_ends() -> None:
    """Keras's falls to 0 after 150 bad steps and never rises again, and grows to infinity."""
    optimizer, (variable,) = fk.LossScaleOptimizer(stock.ours("SGD"), initial_scale=4.0, dynamic_growth_steps=1), stock.variables([(2,)])
    for _ in range(20):
        optimizer.apply([torch.tensor([1.0, np.inf])], [variable])
    assert float(optimizer.dynamic_scale.numpy()) == 2.0**-14
    assert int(optimizer.iterations.numpy()) == 0
    optimizer.dynamic_scale.assign(2.0**126)
    for _ in range(3):
        optimizer.apply([torch.zeros(2)], [variable])
    assert float(optimizer.dynamic_scale.numpy()) == 2.0**127


@pytest.mark.parametrize("inner", ["stock", "subclass"])
def test_loss_scale_around_others(inner: str) -> None:
    class Mine(fk.SGD):
        def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
            self.assign_sub(variable, gradient * 2.0)

    wrapped = Mine(0.1) if inner == "subclass" else keras.optimizers.SGD(2.0)
    optimizer, (variable,) = fk.LossScaleOptimizer(wrapped, initial_scale=4.0), [keras.Variable(np.zeros(2))]
    optimizer.apply([torch.tensor([4.0, -8.0])], [variable])
    assert variable.numpy().tolist() == [-2.0, 4.0]
