"""Catalogue B, continued: devices, dtypes, sparse gradients, tensors that are not plain memory."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import DTYPES, EXECUTORS, RULES, SOME_RULES, assert_same, bits, build, launches, outcome, randn, run, state
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.mark.parametrize("executor", EXECUTORS)
def test_B13_tensors_on_different_devices_are_refused(executor: str) -> None:
    variable = torch.ones(3)
    with pytest.raises(TypeError, match=r"gradient of variable 0 .* on meta, which has no storage"):
        build("sgd", executor).apply_gradients([(torch.ones(3, device="meta"), variable)])
    with pytest.raises(TypeError, match=r"variable 1 .* on meta, which has no storage"):
        build("sgd", executor).apply_gradients([(torch.ones(3), variable), (torch.ones(3), torch.ones(3, device="meta"))])
    assert torch.equal(variable, torch.ones(3))


@pytest.mark.gpu
def test_B13_a_gradient_on_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match=r"is on cpu, the variable on cuda:0\. Move one of them"):
        build("sgd").apply_gradients([(torch.ones(3), torch.ones(3, device="cuda"))])


@pytest.mark.parametrize("rule", SOME_RULES)
def test_B14_all_pairs_of_variable_and_gradient_dtypes_in_one_call(rule: str) -> None:
    pairs = list(itertools.product(DTYPES, DTYPES))
    initial = [randn(7, seed=i, dtype=v) for i, (v, _) in enumerate(pairs)]
    gradients = [randn(7, seed=-i, dtype=g) for i, (_, g) in enumerate(pairs)]
    expected = outcome(rule, "reference", initial, [gradients])
    with launches(16):
        assert_same(outcome(rule, "triton", initial, [gradients]), expected)
    for v, g, result in zip(initial, gradients, expected[:16], strict=True):
        assert_same(outcome(rule, "reference", [v], [[g]])[:1], [result])


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_B15_B16_B17_variables_that_are_not_real_floats_are_refused(dtype: torch.dtype, executor: str) -> None:
    variable = torch.ones(3).to(dtype)
    optimizer = build("adam", executor)
    with pytest.raises(TypeError, match=rf"variable 1 \(3,\) must be floating point \(.*\), got {dtype}"):
        optimizer.apply_gradients([(torch.ones(3), torch.ones(3)), (torch.ones(3), variable)])
    assert optimizer.weights == []


@pytest.mark.parametrize("executor", EXECUTORS)
def test_B18_float64_variables_keep_all_their_digits(executor: str) -> None:
    """Against numpy in float64; as in Keras, hyperparameters pass through float32 and epsilon does not."""
    variable, gradient = randn(50, dtype=torch.float64), randn(50, seed=1, dtype=torch.float64)
    p, g, m, v = variable.numpy().copy(), gradient.numpy(), np.zeros(50), np.zeros(50)
    optimizer = build("adam", executor)
    rate, beta_1, beta_2 = (np.float64(np.float32(x)) for x in (0.001, 0.9, 0.999))
    for t in range(1, 4):
        optimizer.apply_gradients([(gradient, variable)])
        m += (g - m) * (1 - beta_1)
        v += (g * g - v) * (1 - beta_2)
        p -= m * (rate * np.sqrt(1 - beta_2**t) / (1 - beta_1**t)) / (np.sqrt(v) + 1e-7)
    assert {w.dtype for w in optimizer.weights[1:]} == {torch.float64}
    assert np.allclose(variable.numpy(), p, rtol=1e-15, atol=0)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("given", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_B19_a_gradient_of_another_dtype_is_converted_once(dtype: torch.dtype, given: torch.dtype, executor: str) -> None:
    # squares of the last ones are out of float32's range
    gradient = torch.cat([randn(30, seed=1, dtype=torch.float64), torch.tensor([1e30, 1e-30, 1e-23], dtype=torch.float64)]).to(given)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    expected = outcome("adam", "reference", [randn(33, dtype=dtype)], [[gradient.to(compute)]])
    assert_same(outcome("adam", executor, [randn(33, dtype=dtype)], [[gradient]]), expected)


@pytest.mark.parametrize(
    "gradient",
    [torch.ones(3, dtype=torch.int32), torch.ones(3, dtype=torch.complex64), np.array(["a"] * 3)],
    ids=["int32", "complex64", "text"],
)
def test_B19_gradients_that_are_not_real_floats_are_refused(gradient: Any) -> None:
    with pytest.raises(TypeError, match="gradient of variable 0"):
        build("sgd").apply_gradients([(gradient, torch.ones(3))])


def coo(rows: list[int], values: Tensor, size: int) -> Tensor:
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, (size, *values.shape[1:]), check_invariants=True)


@pytest.mark.parametrize("rule", RULES)
def test_B20_sparse_gradients_with_repeated_rows_and_with_none(rule: str) -> None:
    repeated = coo([4, 1, 4], randn(3, 2, seed=1), 6)
    nothing = coo([], torch.zeros(0, 2), 6)
    for gradient, rows in ((repeated, {1, 4}), (repeated.coalesce(), {1, 4}), (nothing, set())):
        results = [outcome(rule, executor, [randn(6, 2)], [[gradient]] * 2) for executor in EXECUTORS]
        assert_same(*results)
        moved = set(np.nonzero(results[0][0] != bits(randn(6, 2)))[0].tolist())
        assert moved <= rows or build(rule).sparse_rows == "all"
        assert results[0][1] == 2  # a step without rows is a step


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_B20_repeated_rows_are_summed_first(rule: str, executor: str) -> None:
    gradients = [coo([4, 1, 4], torch.tensor([[1.0], [2.0], [4.0]]), 6), coo([1, 4], torch.tensor([[2.0], [5.0]]), 6)]
    assert_same(*(outcome(rule, executor, [torch.ones(6, 1)], [[g]]) for g in gradients))


BAD_SPARSE: dict[str, tuple[Callable[[], Tensor], type[Exception], str]] = {
    "csr": (lambda: torch.ones(3, 2).to_sparse_csr(), TypeError, "layout torch.sparse_csr"),
    "elements": (lambda: torch.ones(3, 2).to_sparse(), ValueError, "2 sparse dimensions"),
    "rows": (lambda: coo([0], torch.ones(1, 2), 4), ValueError, r"gradient shape \(4, 2\) != variable shape \(3, 2\)"),
    "outside": (
        lambda: torch.sparse_coo_tensor([[3]], torch.ones(1, 2), (3, 2), check_invariants=False),
        ValueError,
        "row indices from 3 to 3 for 3 rows",
    ),
    "integers": (lambda: coo([0], torch.ones(1, 2, dtype=torch.int64), 3), TypeError, "must be floating point"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("kind", BAD_SPARSE)
def test_B20_other_sparse_gradients_are_refused_before_anything_is_written(kind: str, executor: str) -> None:
    make, error, text = BAD_SPARSE[kind]
    optimizer, variables = build("adam", executor), [torch.ones(3, 2), torch.ones(3, 2)]
    for built in (False, True):
        before = state(optimizer, variables)
        with pytest.raises(error, match=text):
            optimizer.apply_gradients(list(zip([torch.ones(3, 2), make()], variables, strict=True)))
        assert_same(state(optimizer, variables), before, built)
        optimizer.apply_gradients([(torch.ones(3, 2), v) for v in variables])


class Wrapper(Tensor):
    """A tensor without memory of its own, as DTensor and quantized tensors are."""

    @staticmethod
    def __new__(cls, *args: Any) -> Any:
        return Tensor._make_wrapper_subclass(cls, (3,), dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, function: Any, *args: Any, **kwargs: Any) -> Any:
        assert function is torch.ops.aten.detach.default, "the tensor was used"
        return cls()


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("kind", ["meta", "fake", "wrapper"])
def test_B21_tensors_without_memory_are_refused(kind: str, executor: str) -> None:
    with FakeTensorMode():
        fake = torch.ones(3)
    strange = {"meta": torch.ones(3, device="meta"), "fake": fake, "wrapper": Wrapper()}[kind]
    for pair in ((torch.ones(3), strange), (strange, torch.ones(3))):
        with pytest.raises(TypeError, match=r"variable 0 .* has no storage of its own\. Pass a local tensor"):
            build("sgd", executor).apply_gradients([pair])


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_B21_tensors_inside_a_functional_transform_are_refused(transform: Any) -> None:
    def step(x: Tensor) -> Tensor:
        build("sgd").apply_gradients([(x, torch.ones(())), (torch.ones(()), x)])
        return x

    with pytest.raises(RuntimeError, match=r"belongs to a torch\.func transform"):
        transform(step)(torch.ones(()) if transform is torch.func.grad else torch.ones(3))


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("which", [0, 1])
def test_B22_tensors_whose_storage_was_freed_are_refused(which: int, executor: str) -> None:
    pair = [torch.ones(8), torch.ones(8)]
    pair[which].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"variable 0 \(8,\) .* outgrows its storage, which was resized or freed"):
        build("sgd", executor).apply_gradients([tuple(pair)])


def test_B23_results_of_operations_and_inference_tensors_are_refused() -> None:
    leaf = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"is not a leaf: it is the result of MulBackward0\. Pass the leaf"):
        build("sgd").apply_gradients([(torch.ones(3), leaf * 2)])
    with torch.inference_mode():
        variable = torch.ones(3)
    with pytest.raises(ValueError, match=r"inference tensor, which cannot be updated\. Create it outside"):
        build("sgd").apply_gradients([(torch.ones(3), variable)])


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_B23_steps_may_be_taken_in_every_grad_mode(mode: Any, executor: str) -> None:
    expected = outcome("amsgrad", "reference", [randn(5)], [[randn(5, seed=s)] for s in range(4)])
    for inside in ([0], [1], [0, 1, 2, 3]):
        optimizer, variable = build("amsgrad", executor), torch.nn.Parameter(randn(5))
        for s in range(4):
            gradient = randn(5, seed=s).requires_grad_()
            with mode() if s in inside else torch.enable_grad():
                optimizer.apply_gradients([(gradient, variable)])
        assert_same(state(optimizer, [variable]), expected)
        assert variable.requires_grad
        assert variable.grad_fn is None
        optimizer.set_weights(optimizer.get_weights())


@pytest.mark.parametrize("executor", EXECUTORS)
def test_B24_backward_through_an_updated_variable_raises(executor: str) -> None:
    optimizer, (variable,) = run("sgd", executor, [torch.ones(3)], [[torch.ones(3)]])
    variable.requires_grad_()
    loss = (variable * variable).sum()
    optimizer.apply_gradients([(torch.ones(3), variable)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
