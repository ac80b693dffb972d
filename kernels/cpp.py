"""The C++ kernel for CPUs: every optimizer, every variable of a bucket, one call. The rule is written into it."""

import functools
import itertools
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

TYPES = {
    **{torch.float32: "float", torch.float64: "double", torch.float16: "float16", torch.bfloat16: "bfloat16"},
    **{torch.uint8: "uint8_t", torch.int8: "int8_t", torch.int16: "int16_t", torch.int32: "int32_t"},
}
Planes = tuple[tuple[torch.dtype, int], ...]


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
        "CONSTANTS": "\n".join(f"    const C {name} = {name[0]}[{name[1:]}];" for name in sorted(used)),
        "BODY": "\n".join(f"            {line}" for line in body),
    }
    return functools.reduce(lambda text, part: text.replace(f"@{part[0]}@", part[1]), parts.items(), cpp_text.HEAD + template)


_DEFINED = re.compile(r"^const (\w+) (t\d+) =", re.MULTILINE)  # of an element


def _factors(body: list[str]) -> tuple[Value, ...]:
    return tuple(Value(f"f{k}", body) for k in range(5))


# What a measured update has more: three sums of squares for each block.
_MEASURED = {
    "SUMS": ", double* sums",
    "ROW": ", sums + 3 * i",
    "SUMMED": "\n    sums[0] = sum0, sums[1] = sum1, sums[2] = sum2;",
}


def update_source(
    rule: Any, prepare: Any, scalars: Any, planes: Planes, dtypes: tuple[torch.dtype, torch.dtype], measured: Any = None
) -> str:
    """The update's C++.

    scalars: the NamedTuple class of the step's scalars. planes: of each slot its dtype, and how many elements share a value (0: a
    position). dtypes: of the variable and its gradient. measured: None, or what of the gradient is summed, as `kernels.update` does.
    """
    body: list[str] = []
    load = Value("", body).new
    p, g = load("Codec<Stage<V>::Type>::decode(v[i])"), load("Codec<Stage<G>::Type>::decode(g[i])")
    values = tuple(_loaded(k, dtype, group, load) for k, (dtype, group) in enumerate(planes))
    s = scalars(*(Value(f"s{k}", body) for k in range(len(scalars._fields))))
    new, values = traced(rule)(p, traced(prepare)(g, _factors(body)), values, s)
    if measured is not None:
        _sum_squares(body, traced(measured)(g, _factors(body)), p, new)
    body.append(f"v[i] = Codec<Stage<V>::Type>::encode({cpp_op.text(new)});")
    stored = [(k, *plane) for k, plane in enumerate(planes) if plane[1]]
    body += [_stored(k, dtype, group, value) for (k, dtype, group), value in zip(stored, values, strict=True)]
    grouped = any(group > 1 for _, group in planes)
    float16 = torch.float16 in (*dtypes, *(dtype for dtype, _ in planes))
    parts = {
        "BLOCK": str(BLOCK),
        "STAGE": str(cpp_op.GROUP if grouped else STAGE if float16 else BLOCK),
        "SLOTS": str(len(planes)),
        "LOOPS": _loops(body, "" if measured is None else " reduction(+ : sum0, sum1, sum2)"),
        **_slots(planes),
        **(dict.fromkeys(_MEASURED, "") if measured is None else _MEASURED),
    }
    template = (
        cpp_text.UPDATE
        if measured is None
        else cpp_text.UPDATE.replace("@CONSTANTS@", "@CONSTANTS@\n    double sum0 = 0, sum1 = 0, sum2 = 0;")
    )
    return _filled(template, body, dtypes, parts)


def _loaded(k: int, dtype: torch.dtype, group: int, load: Callable[..., Value]) -> Value:
    if not group:
        return load(f"int32_t(slot{k} + at + i)", "int32_t")
    if not dtype.is_floating_point:
        return load(f"int32_t(w{k}[i])", "int32_t")
    return load(f"w{k}[0]", grouped=True) if group > 1 else load(f"Codec<Stage<S{k}>::Type>::decode(w{k}[i])")


def _stored(k: int, dtype: torch.dtype, group: int, value: Any) -> str:
    if not dtype.is_floating_point:
        return f"w{k}[i] = {TYPES[dtype]}({cpp_op.text(value)});"
    return f"@w{k}[0] = {cpp_op.text(value)};" if group > 1 else f"w{k}[i] = Codec<Stage<S{k}>::Type>::encode({cpp_op.text(value)});"


def _slots(planes: Planes) -> dict[str, str]:
    """What a template says of every slot."""
    real = [(k, dtype, group) for k, (dtype, group) in enumerate(planes) if group]
    at = {k: "at" if group == 1 else f"at / {group}" for k, _, group in real}
    start = [f"(S{k}*)row.slots[{k}] + start / {group}, " if group else f"row.slots[{k}] + start, " for k, (_, group) in enumerate(planes)]
    return {
        "STAGES": "\n".join(f"    Stage<S{k}> stage{k};" for k, *_ in real),
        "TYPES": "".join(f" using S{k} = {TYPES[dtype]};" for k, dtype, _ in real),
        "PARAMETERS": "".join(f"S{k}* slot{k}, " if group else f"int64_t slot{k}, " for k, (_, group) in enumerate(planes)),
        "VIEWS": "\n".join(f"        auto* __restrict w{k} = stage{k}.in(slot{k} + {at[k]}, n);" for k, *_ in real),
        "WRITTEN": "\n".join(f"        stage{k}.out(slot{k} + {at[k]}, n);" for k, *_ in real),
        "ARGUMENTS": "".join(start),
    }


def _loops(body: list[str], reduction: str) -> str:
    """The statements: those of elements in loops, those of groups between them. What a later part uses lies in an array."""
    parts = [list(lines) for _, lines in itertools.groupby(body, lambda line: line.startswith("@"))]
    made = {name: (number, kind) for number, part in enumerate(parts) for kind, name in _DEFINED.findall("\n".join(part))}
    uses = {(name, number) for number, part in enumerate(parts) for name in re.findall(r"\bt\d+\b", "\n".join(part))}
    kept = {name: made[name][1] for name, number in uses if name in made and number > made[name][0]}
    text = [f"{kind} {name}[{cpp_op.GROUP}];" for name, kind in sorted(kept.items())]
    for part in parts:
        lines = [_DEFINED.sub(lambda d: f"{d[2]} =" if d[2] in kept else d[0], line) for line in part]
        lines = [re.sub(r"\bt\d+\b", lambda n: f"{n[0]}[i]" if n[0] in kept else n[0], line) for line in lines]
        loop = [f"#pragma omp simd{reduction}", "for (int64_t i = 0; i < n; ++i) {", *(f"    {line}" for line in lines), "}"]
        text += [line[1:] for line in lines] if part[0].startswith("@") else loop
    return "\n".join(f"        {line}" for line in text)


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
    return _filled(cpp_text.NORMS, body, dtypes, {"BLOCK": str(block), "SLOTS": "0", "TYPES": ""})
