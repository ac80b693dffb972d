"""The bad-input matrix, part one: arguments of apply_gradients, and what each must raise. Part two is in test_bad_input.py."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from support import randn
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_kopt import Adam
from fused_kopt.optimizer import Optimizer


class Switch:
    """A callable that behaves until a test replaces `action`."""

    def __init__(self, action: Callable[..., Any]) -> None:
        self.action = action

    def __call__(self, *arguments: Any) -> Any:
        return self.action(*arguments)


class World:
    """An Adam with a callable rate, an aggregator and a transformer, and three variables in two buckets."""

    def __init__(self, executor: str, built: bool) -> None:
        self.rate, self.aggregate, self.transform = Switch(lambda: 0.01), Switch(lambda pairs: pairs), Switch(lambda pairs: pairs)
        self.optimizer: Optimizer = Adam(
            self.rate, executor=executor, gradient_aggregator=self.aggregate, gradient_transformers=[self.transform]
        )
        self.a, self.table, self.d = randn(3), randn(4, 2, seed=1), randn(2, seed=2, dtype=torch.float64)
        self.variables = [self.a, self.table, self.d]
        for i in range(2 if built else 0):
            self.step(i)

    def good(self, seed: int = 9) -> list[tuple[Tensor, Tensor]]:
        return [(randn(*v.shape, seed=seed + i, dtype=v.dtype), v) for i, v in enumerate(self.variables)]

    def step(self, seed: int = 9) -> None:
        self.optimizer.apply_gradients(self.good(seed))


class Row(NamedTuple):
    name: str
    call: Callable[[World], Any]
    error: type[BaseException]
    text: str
    when: str = "always"  # or "built", "fresh"


Make = tuple[str, Callable[[World], Any], type[BaseException], str]


def ones(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape, **options)


def freed(tensor: Tensor, left: int = 0) -> Tensor:
    tensor.untyped_storage().resize_(left)
    return tensor


def raising(*arguments: Any, **options: Any) -> Any:
    raise ZeroDivisionError("on purpose")


def coo(indices: list[list[int]], values: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.sparse_coo_tensor(indices, values, shape, check_invariants=False)


def lists(*rows: Make) -> list[Row]:
    """Rows that make the whole argument of apply_gradients."""
    return [
        Row(f"list: {name}", lambda w, make=make: w.optimizer.apply_gradients(make(w)), error, text) for name, make, error, text in rows
    ]


def last(kind: str, *rows: Make) -> list[Row]:
    """Rows that make a bad pair, which comes after pairs that are good."""

    def call(make: Callable[[World], Any]) -> Callable[[World], Any]:
        return lambda w: w.optimizer.apply_gradients([*w.good(), make(w)])

    return [Row(f"{kind}: {name}", call(make), error, text) for name, make, error, text in rows]


FAKE = FakeTensorMode()
NOT_FLOATING = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
NOT_FLOATING += (torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2)
LIST = r"grads_and_vars must be a list of \(gradient, variable\) pairs\. Received: {}\."
PAIR = r"grads_and_vars\[0\] must be a \(gradient, variable\) pair\. Received: {}\."
NO_STORAGE = "which has no storage of its own"
SHARE = r"variable \d \(.*\) and variable 3 \(.*\) share memory"


def shapes(gradient: tuple[int, ...], variable: tuple[int, ...]) -> str:
    return re.escape(f"gradient shape {gradient} != variable shape {variable}")


LISTS = lists(
    ("None", lambda w: None, TypeError, LIST.format("NoneType")),
    ("int", lambda w: 5, TypeError, LIST.format("int")),
    ("str", lambda w: "pairs", TypeError, LIST.format("str")),
    ("set", lambda w: set(w.good()), TypeError, LIST.format("set")),
    ("frozenset", lambda w: frozenset(w.good()), TypeError, LIST.format("frozenset")),
    ("dict", lambda w: dict(w.good()), TypeError, LIST.format("dict")),
    ("tensor", lambda w: w.a, TypeError, LIST.format("Tensor")),
    ("optimizer", lambda w: w.optimizer, TypeError, LIST.format("Adam")),
    ("bare pair", lambda w: w.good()[0], TypeError, PAIR.format("Tensor")),
    ("ints", lambda w: [1, 2], TypeError, PAIR.format("int")),
    ("bytes", lambda w: b"ab", TypeError, PAIR.format("int")),
    ("variables", lambda w: w.variables, TypeError, PAIR.format("Tensor")),
    ("strings of two", lambda w: ["gv"], TypeError, PAIR.format("str")),
    ("sets of two", lambda w: [set(w.good()[0])], TypeError, PAIR.format("set")),
    ("triple", lambda w: [(*w.good()[0], 1)], ValueError, "Received 3 items"),
    ("empty pair", lambda w: [*w.good(), ()], ValueError, r"grads_and_vars\[3\] .* Received 0 items"),
    ("all None", lambda w: [(None, v) for v in w.variables], ValueError, "No gradients provided for any variable"),
    ("generator that raises", lambda w: (p if p[1] is w.a else raising() for p in w.good()), ZeroDivisionError, "on purpose"),
)

NO_VARIABLES = (None, 1.0, "ab", [1.0, 2.0], np.ones(2), nn.Linear(2, 2))
VARIABLES = last(
    "variable",
    *((str(t), lambda w, t=t: (ones(3), ones(3).to(t)), TypeError, f"variable 3 .* must be floating point .*{t}") for t in NOT_FLOATING),
    *((str(type(v)), lambda w, v=v: (ones(2), v), TypeError, r"variable 3 .* must be a torch\.Tensor or Parameter") for v in NO_VARIABLES),
    ("meta", lambda w: (ones(3), ones(3, device="meta")), TypeError, NO_STORAGE),
    ("fake", lambda w: (ones(3), FAKE.from_tensor(ones(3))), TypeError, NO_STORAGE),
    ("uninitialized", lambda w: (ones(3), nn.UninitializedParameter()), RuntimeError, "uninitialized parameter"),
    ("COO", lambda w: (ones(3, 3), torch.eye(3).to_sparse()), TypeError, "layout torch.sparse_coo; variables must be strided"),
    ("CSR", lambda w: (ones(3, 3), torch.eye(3).to_sparse_csr()), TypeError, "layout torch.sparse_csr"),
    ("mkldnn", lambda w: (ones(3, 3), torch.eye(3).to_mkldnn()), TypeError, "layout torch._mkldnn"),
    ("non-leaf", lambda w: (ones(3), nn.Parameter(ones(3)) * 2), ValueError, "is not a leaf: it is the result of MulBackward0"),
    ("view of a leaf", lambda w: (ones(2), nn.Parameter(ones(3))[:2]), ValueError, "is not a leaf: it is the result of SliceBackward0"),
    ("inference", lambda w: (ones(3), torch.inference_mode()(ones)(3)), ValueError, "is an inference tensor"),
    ("freed", lambda w: (ones(3), freed(ones(3))), ValueError, "outgrows its storage, which was resized or freed"),
    ("shrunk", lambda w: (ones(3), freed(ones(3), 8)), ValueError, "outgrows its storage"),
    ("expanded", lambda w: (ones(3, 2), ones(2).expand(3, 2)), ValueError, r"overlapping memory: shape \(3, 2\), strides \(0, 1\)"),
    ("windows", lambda w: (ones(3, 2), ones(4).as_strided((3, 2), (1, 1))), ValueError, r"overlapping memory.* strides \(1, 1\)"),
    ("alias", lambda w: (ones(3), w.a.detach()), ValueError, SHARE),
    ("part", lambda w: (ones(2), w.a[1:]), ValueError, SHARE),
    ("row", lambda w: (ones(2), w.table[3]), ValueError, SHARE),
    ("transposed", lambda w: (ones(2, 4), w.table.T), ValueError, SHARE),
    ("every other", lambda w: (ones(4), w.table.view(-1)[1::2]), ValueError, SHARE),
    ("other dtype", lambda w: (ones(4), w.d.view(torch.float32)), ValueError, SHARE),
    ("numpy's memory", lambda w: (ones(3), torch.from_numpy(w.a.numpy())), ValueError, SHARE),
)

WRONG_SHAPES = [(4,), (1,), (), (3, 1), (1, 3), (0,)]  # most of which would broadcast
GRADIENTS = last(
    "gradient",
    *((str(shape), lambda w, shape=shape: (torch.zeros(shape), w.a), ValueError, shapes(shape, (3,))) for shape in WRONG_SHAPES),
    ("transposed", lambda w: (ones(2, 4), w.table), ValueError, shapes((2, 4), (4, 2))),
    ("number", lambda w: (1.0, w.a), ValueError, shapes((), (3,))),
    *((str(t), lambda w, t=t: (ones(3).to(t), w.a), TypeError, f"gradient of variable 3 .* floating point .*{t}") for t in NOT_FLOATING),
    ("meta", lambda w: (ones(3, device="meta"), w.a), TypeError, NO_STORAGE),
    ("fake", lambda w: (FAKE.from_tensor(ones(3)), w.a), TypeError, NO_STORAGE),
    ("freed", lambda w: (freed(ones(3)), w.a), ValueError, "gradient of .* outgrows its storage"),
    ("CSR", lambda w: (ones(4, 2).to_sparse_csr(), w.table), TypeError, "gradients strided or sparse COO"),
    ("2 sparse dimensions", lambda w: (ones(4, 2).to_sparse(), w.table), ValueError, r"2 sparse dimensions; rows \(1\)"),
    ("sparse integers", lambda w: (coo([[1]], ones(1, 2, dtype=torch.int64), (4, 2)), w.table), TypeError, "must be floating point"),
    ("sparse shape", lambda w: (coo([[1]], ones(1, 2), (5, 2)), w.table), ValueError, shapes((5, 2), (4, 2))),
    ("sparse row 4 of 4", lambda w: (coo([[0, 4]], ones(2, 2), (4, 2)), w.table), ValueError, "row indices from 0 to 4 for 4 rows"),
    ("sparse row -1", lambda w: (coo([[-1, 0]], ones(2, 2), (4, 2)), w.table), ValueError, "row indices from -1 to 0 for 4 rows"),
    ("strings", lambda w: (["1", "2", "3"], w.a), TypeError, "must be a tensor or an array of real numbers"),
    ("None among numbers", lambda w: ([1.0, None, 2.0], w.a), TypeError, "list of object"),
    ("bool array", lambda w: (np.ones(3, bool), w.a), TypeError, "ndarray of bool"),
    ("complex array", lambda w: (np.ones(3, complex), w.a), TypeError, "ndarray of complex128"),
    ("ragged", lambda w: ([[1.0], [2.0, 3.0]], w.table), ValueError, "inhomogeneous"),
    ("dict", lambda w: ({}, w.a), TypeError, "dict of object"),
    ("function", lambda w: (raising, w.a), TypeError, "function of object"),
)

ARGUMENTS = [*LISTS, *VARIABLES, *GRADIENTS]
