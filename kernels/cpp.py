"""The C++ kernel for CPUs: every optimizer, every variable of a bucket, one call. The rule is written into it."""

import functools
import re
import types
from collections.abc import Callable
from typing import Any

import torch

from fused_kopt.kernels import cpp_op, cpp_text
from fused_kopt.kernels.cpp_op import Value
from fused_kopt.kernels.rebind import is_torch_op, rebind

# Elements per unit of work: 256 KiB of 7 float32 streams at most, so that threads share the work evenly.
BLOCK = 8192
# Elements of a buffer that stays in the first cache.
STAGE = 1024

TYPES = {torch.float32: "float", torch.float64: "double", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@functools.cache
def traced(function: types.FunctionType) -> Callable[..., Any]:
    """The rule as a function of `Value`s: its `op` is the C++ twin, in the functions it calls too."""

    def replace(value: Any) -> Any:
        if is_torch_op(value):
            return cpp_op
        return traced(value) if isinstance(value, types.FunctionType) else value

    return rebind(function, replace)


def _filled(template: str, body: list[str], dtypes: tuple[torch.dtype, ...], parts: dict[str, str]) -> str:
    """A template with its types, the statements of its loop, and the constants that these use. dtypes: as for a source."""
    used = set(re.findall(r"\b[fs]\d+\b", "\n".join(body)))  # `keep` reads no factors, and none may be there
    parts |= {
        "C": "double" if dtypes[0] == torch.float64 else "float",
        "V": TYPES[dtypes[0]],
        "G": TYPES[dtypes[1]],
        "S": TYPES[dtypes[-1]],
        "CONSTANTS": "\n".join(f"    const C {name} = {name[0]}[{name[1:]}];" for name in sorted(used)),
        "BODY": "\n".join(f"            {line}" for line in body),
    }
    return functools.reduce(lambda text, part: text.replace(f"@{part[0]}@", part[1]), parts.items(), cpp_text.HEAD + template)


def _factors(body: list[str]) -> tuple[Value, ...]:
    return tuple(Value(f"f{k}", body) for k in range(5))


# What a measured update has more: three sums of squares for each block.
_MEASURED = {
    "SUMS": ", double* sums",
    "ROW": ", sums + 3 * i",
    "REDUCTION": " reduction(+ : sum0, sum1, sum2)",
    "SUMMED": "\n    sums[0] = sum0, sums[1] = sum1, sums[2] = sum2;",
}


def update_source(rule: Any, prepare: Any, scalars: Any, slots: int, dtypes: tuple[torch.dtype, ...], measured: Any = None) -> str:
    """The update's C++. dtypes: of the variable, its gradient and its slots; scalars: the NamedTuple class of the step's scalars;
    measured: None, or what of the gradient is summed, as `kernels.update` does it.
    """
    body: list[str] = []
    load = Value("", body).new
    p, g = load("Codec<Stage<V>::Type>::decode(v[i])"), load("Codec<Stage<G>::Type>::decode(g[i])")
    values = tuple(load(f"Codec<Stage<S>::Type>::decode(w{k}[i])") for k in range(slots))
    s = scalars(*(Value(f"s{k}", body) for k in range(len(scalars._fields))))
    new, values = traced(rule)(p, traced(prepare)(g, _factors(body)), values, s)
    if measured is not None:
        _sum_squares(body, traced(measured)(g, _factors(body)), p, new)
    body.append(f"v[i] = Codec<Stage<V>::Type>::encode({cpp_op.text(new)});")
    body += [f"w{k}[i] = Codec<Stage<S>::Type>::encode({cpp_op.text(value)});" for k, value in enumerate(values)]
    parts = {
        "BLOCK": str(BLOCK),
        "STAGE": str(STAGE if torch.float16 in dtypes else BLOCK),
        "SLOTS": str(slots),
        "PARAMETERS": "".join(f"S* slot{k}, " for k in range(slots)),
        "VIEWS": "\n".join(f"        auto* __restrict w{k} = slots[{k}].in(slot{k} + at, n);" for k in range(slots)),
        "WRITTEN": "\n".join(f"        slots[{k}].out(slot{k} + at, n);" for k in range(slots)),
        "ARGUMENTS": "".join(f"(S*)row.slots[{k}] + start, " for k in range(slots)),
        **(dict.fromkeys(_MEASURED, "") if measured is None else _MEASURED),
    }
    template = (
        cpp_text.UPDATE
        if measured is None
        else cpp_text.UPDATE.replace("@CONSTANTS@", "@CONSTANTS@\n    double sum0 = 0, sum1 = 0, sum2 = 0;")
    )
    return _filled(template, body, dtypes, parts)


def _sum_squares(body: list[str], gradient: Any, old: Value, new: Any) -> None:
    """Add the squares of a gradient, of the step as it is stored, and of the new variable."""
    body.append(f"const double x0 = {cpp_op.text(gradient)}, x2 = Codec<V>::decode(Codec<V>::encode({cpp_op.text(new)}));")
    body.append(f"const double x1 = x2 - {old.text};")
    body += [f"sum{k} += x{k} * x{k};" for k in range(3)]


def norm_source(prepare: Any, dtypes: tuple[torch.dtype, torch.dtype], block: int) -> str:
    """The square norms' C++. dtypes: of the variable and of the gradient; block: elements per sum."""
    body: list[str] = []
    value = traced(prepare)(Value("", body).new("Codec<G>::decode(gradient[i])"), _factors(body))
    body.append(f"squares[i] = double({value.text}) * double({value.text});")
    return _filled(cpp_text.NORMS, body, dtypes, {"BLOCK": str(block), "SLOTS": "0"})
