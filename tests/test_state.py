"""State that moves: set_weights, pickles, copies, and variables that appear late, twice or in two optimizers."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import EXECUTORS, assert_same, bits, launches, randn, state
from test_weights import MIXED, ORDERS, every_order, make, new_variables, step
from torch import Tensor, nn

from fused_kopt import SGD, Adam, Nadam
from fused_kopt.optimizer import Optimizer

every_executor = pytest.mark.parametrize("executor", EXECUTORS)
# The interpreter takes 10 ms a launch: all configurations in the reference, one per kind of state in the interpreter.
RUNS = [(key, "reference") for key in ORDERS] + [(key, "triton") for key in ("SGD momentum", "Adam amsgrad", "Nadam", "Ftrl")]
V1 = ("RMSprop", "RMSprop centered", "RMSprop momentum centered", "Adagrad", "Adadelta")  # lists without iterations are accepted


def built(key: str, names: str = "ab", steps: int = 2, **options: Any) -> tuple[Optimizer, dict[str, Tensor]]:
    optimizer, variables = make(key, **options), new_variables(names, MIXED)
    for i in range(steps):
        step(optimizer, variables, names, seed=i)
    return optimizer, variables


def snapshot(optimizer: Optimizer, variables: dict[str, Tensor]) -> list[np.ndarray]:
    return state(optimizer, list(variables.values()))


def refuse(optimizer: Optimizer, weights: Any, error: type[Exception], text: str) -> None:
    """Asserts that set_weights raises and writes nothing."""
    before = [bits(weight) for weight in optimizer.weights]
    with pytest.raises(error, match=text):
        optimizer.set_weights(weights)
    assert_same([bits(weight) for weight in optimizer.weights], before)


CONVERSIONS: list[Callable[[list[Any]], Any]] = [
    list,
    tuple,
    lambda weights: [torch.tensor(w) for w in weights],
    lambda weights: [np.asarray(w, order="F") for w in weights],
]


@pytest.mark.parametrize("convert", CONVERSIONS, ids=["list", "tuple", "torch", "Fortran"])
@every_order
def test_weights_set_in_another_optimizer_continue_bit_for_bit(key: str, convert: Callable[[list[Any]], Any]) -> None:
    (source, first), (target, second) = built(key, "cab", 3), built(key, "cab", 1)
    for name, variable in first.items():
        second[name].copy_(variable)
    target.set_weights(convert(source.get_weights()))
    for i in range(2):
        step(source, first, "cab", seed=9 + i)
        step(target, second, "cab", seed=9 + i)
    assert_same(snapshot(target, second), snapshot(source, first))


def test_live_weights_may_be_given_in_another_order() -> None:
    optimizer, _ = built("Adam", "a")
    iterations, m, v = optimizer.get_weights()
    optimizer.set_weights([optimizer.weights[0], optimizer.weights[2], optimizer.weights[1]])
    assert_same([bits(w) for w in optimizer.weights], [bits(w) for w in (iterations, v, m)])


@pytest.mark.parametrize("kind", [list, tuple])
@every_order
def test_v1_lists_without_iterations(key: str, kind: Any) -> None:
    optimizer, _ = built(key)
    values = [w + 1 for w in optimizer.get_weights()]
    if key in V1:
        optimizer.set_weights(kind(values[1:]))
        assert_same([bits(w) for w in optimizer.weights], [bits(np.int64(0)), *(bits(v) for v in values[1:])])
    else:
        wanted = len(values)
        refuse(optimizer, kind(values[1:]), ValueError, f"a  weight list of length {wanted - 1}, but .* was expecting {wanted} weights")


@pytest.mark.parametrize(("key", "variables"), [("Adam", "a"), ("Adam", "abc"), ("Adam amsgrad", "ab"), ("Adamax", "ab")])
def test_v1_lists_with_vhats(key: str, variables: str) -> None:
    optimizer, _ = built(key, variables)
    values = [w + 1 for w in optimizer.get_weights()]
    count = (len(values) - 1) // 2
    given = values + [np.zeros(3)] * (3 * count + 1 - len(values))
    if key == "Adamax":  # which never had any
        refuse(optimizer, given, ValueError, "length 7, but the optimizer was expecting 5")
        return
    optimizer.set_weights(given)
    assert_same([bits(w) for w in optimizer.weights], [bits(v) for v in values])


@pytest.mark.parametrize("given", [[np.int64(1)], [np.int64(1), np.zeros(2)], [np.zeros(2)] * 3], ids=len)
@every_order
def test_an_unbuilt_optimizer_has_no_weights_to_set(key: str, given: list[Any]) -> None:
    optimizer = make(key)
    # Keras's Adam cuts a list of one down to nothing and returns: a lost step count
    text = rf"You called `set_weights\(weights\)` on optimizer \w+ with a  weight list of length {len(given)}, but"
    refuse(optimizer, given, ValueError, text)
    optimizer.set_weights([])
    assert optimizer.weights == []


def changed(position: int, value: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda weights: [value if i == position else w for i, w in enumerate(weights)]


WRONG: list[tuple[Callable[[list[Any]], Any], type[Exception], str]] = [
    (lambda w: w[:-1], ValueError, "weight list of length 4, but the optimizer was expecting 5"),
    (lambda w: [*w, w[-1]], ValueError, "weight list of length 6, but the optimizer was expecting 5"),
    (lambda w: [], ValueError, "length 0"),
    (lambda w: None, TypeError, "NoneType"),
    (lambda w: 3, TypeError, "int"),
    (changed(0, 3), AttributeError, "'int' object has no attribute 'shape'"),
    (changed(3, [0.0, 0.0]), AttributeError, "'list' object has no attribute 'shape'"),
    (changed(0, np.zeros(1)), ValueError, r"Optimizer weight shape \(\) not compatible with provided weight shape \(1,\)\."),
    (changed(4, np.zeros(1)), ValueError, r"Optimizer weight shape \(\) not compatible with provided weight shape \(1,\)\."),
    (changed(3, np.zeros(3)), ValueError, r"Optimizer weight shape \(2,\) not compatible with provided weight shape \(3,\)\."),
    (changed(3, np.zeros((2, 1))), ValueError, r"shape \(2,\) not compatible with provided weight shape \(2, 1\)"),
    (changed(3, np.zeros(1)), ValueError, "not compatible"),  # would broadcast
    (changed(3, np.zeros(2, complex)), TypeError, r"must be real numbers\. Received: ndarray of dtype complex128"),
    (changed(3, torch.zeros(2, dtype=torch.complex64)), TypeError, r"must be real numbers\. Received: Tensor of dtype torch\.complex64"),
    (changed(3, np.array([None, 1.0])), TypeError, "dtype object"),
    (changed(3, np.array(["1", "2"])), TypeError, "must be real numbers"),
    (changed(4, np.array(True)), TypeError, "dtype bool"),
    (changed(4, torch.zeros((), device="meta")), NotImplementedError, "meta"),
]


@pytest.mark.parametrize(("change", "error", "text"), WRONG, ids=range(len(WRONG)))
def test_set_weights_refuses_and_writes_nothing(change: Callable[[list[Any]], Any], error: type[Exception], text: str) -> None:
    optimizer, variables = built("Adam")
    twin, twins = built("Adam")
    refuse(optimizer, change([w + 1 for w in optimizer.get_weights()]), error, text)
    for o, v in ((optimizer, variables), (twin, twins)):
        step(o, v, "ab", seed=5)
    assert_same(snapshot(optimizer, variables), snapshot(twin, twins))


CASTS = [
    (0, np.float64(3.7), 3),
    (0, torch.tensor(5), 5),
    (0, np.uint8(7), 7),
    (3, np.array([1, 2]), [1.0, 2.0]),
    (3, np.array([0.1, 2.0]), [float(np.float32(0.1)), 2.0]),
    (3, torch.tensor([0.5, 2.0], dtype=torch.bfloat16), [0.5, 2.0]),
    (3, np.array([0.5, 9.0, 2.0], np.float16)[::2], [0.5, 2.0]),
    (3, nn.Parameter(torch.ones(2)), [1.0, 1.0]),
]


@pytest.mark.parametrize(("position", "value", "stored"), CASTS, ids=range(len(CASTS)))
def test_set_weights_casts_to_each_weights_dtype(position: int, value: Any, stored: Any) -> None:
    optimizer, _ = built("Adam")
    dtypes = [w.dtype for w in optimizer.weights]
    optimizer.set_weights(changed(position, value)(optimizer.get_weights()))
    assert (optimizer.weights[position].tolist(), [w.dtype for w in optimizer.weights]) == (stored, dtypes)


def by_pickle(protocol: int) -> Callable[[Any], Any]:
    return lambda both: pickle.loads(pickle.dumps(both, protocol=protocol))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, *map(by_pickle, (2, 3, 4, 5))], ids=["deepcopy", "2", "3", "4", "5"])
@pytest.mark.parametrize(("key", "executor"), RUNS)
def test_a_duplicate_continues_bit_for_bit(key: str, executor: str, duplicate: Callable[[Any], Any]) -> None:
    optimizer, variables = make(key, executor=executor), new_variables("abcd", MIXED)
    variables["a"] = nn.Parameter(variables["a"])
    for order in ("ab", "abc"):
        step(optimizer, variables, order)
    optimizer.add_slot(variables["a"], "own", 0.5, (5,))
    _ = optimizer.learning_rate.mul_(0.5)
    twin, twins = duplicate((optimizer, variables))
    before = snapshot(optimizer, variables)
    assert_same(snapshot(twin, twins), before)
    step(twin, twins, "dcba", seed=7)
    assert_same(snapshot(optimizer, variables), before)  # nothing is shared
    step(optimizer, variables, "dcba", seed=7)
    assert_same(snapshot(twin, twins), snapshot(optimizer, variables))
    assert (twin.get_config(), twin.executor) == (optimizer.get_config(), executor)


@every_executor
def test_late_variables_keep_one_launch_per_bucket(executor: str) -> None:
    optimizer, variables = make("Adam", executor=executor), new_variables("abcd", MIXED)
    held: dict[tuple[str, str], Tensor] = {}
    for i, order in enumerate(("a", "ad", "adb", "dcba", "cab")):
        buckets = len({MIXED[name] for name in order})
        with launches(buckets if executor == "triton" else 0):
            step(optimizer, variables, order, seed=i)
        now = {(name, slot): optimizer.get_slot(variables[name], slot) for name in sorted(order) for slot in "mv"}
        assert all(now[place] is tensor for place, tensor in held.items() if place in now)
        held |= now
    flat = optimizer._state.bucket(variables["d"]).flat["m"]
    assert held["d", "m"].untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()


@pytest.mark.parametrize(("key", "executor"), RUNS)
def test_the_same_variable_twice_is_updated_twice_in_one_step(key: str, executor: str) -> None:
    (optimizer, variables), (twin, twins) = (built(key, "ab", executor=executor) for _ in range(2))
    with launches(3 if executor == "triton" else 0):  # a and b are two buckets; a's second update is a launch of its own
        optimizer.apply_gradients([(randn(2, seed=4), variables["a"]), (0.5, variables["b"]), (randn(2, seed=5), variables["a"])])
    cache = twin._cache.item() if isinstance(twin, Nadam) else 0.0
    twin.apply_gradients([(randn(2, seed=4), twins["a"]), (0.5, twins["b"])])
    twin.iterations.sub_(1)  # the second gradient is of the same step
    if isinstance(twin, Nadam):
        twin._cache.fill_(cache)
    twin.apply_gradients([(randn(2, seed=5), twins["a"])])
    assert_same(snapshot(optimizer, variables), snapshot(twin, twins))


@every_executor
def test_two_optimizers_share_variables(executor: str) -> None:
    variable, alone = randn(5), randn(5)
    first, second = Adam(executor=executor), SGD(momentum=0.5, executor=executor)
    single = Adam(executor=executor)
    for i in range(3):
        first.apply_gradients([(randn(5, seed=i), variable)])
        second.apply_gradients([(randn(5, seed=i), variable)])
        single.apply_gradients([(randn(5, seed=i), alone)])
    assert_same([bits(w) for w in first.weights], [bits(w) for w in single.weights])  # Adam's slots depend on gradients only
    assert (int(second.iterations), second.get_slot_names()) == (3, ["momentum"])
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None
    second.apply_gradients([(randn(5), variable)])
