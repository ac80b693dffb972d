"""The C++ kernel for CPUs: every optimizer, every variable of a bucket, one call. The rule is written into it."""

import functools
import re
import types
from collections.abc import Callable
from typing import Any

import torch

from fused_kopt.kernels import cpp_op
from fused_kopt.kernels.cpp_op import Value
from fused_kopt.kernels.rebind import is_torch_op, rebind

# Elements per unit of work: 256 KiB of 7 float32 streams at most, so that threads share the work evenly.
BLOCK = 8192

TYPES = {torch.float32: "float", torch.float64: "double", torch.float16: "float16", torch.bfloat16: "bfloat16"}

_TEMPLATE = """
#include <cmath>
#include <cstdint>
#include <cstring>

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };
using C = @C@; using V = @V@; using G = @G@;

struct Segment { int64_t variable, gradient, numel, offset; };

template <class To, class From> static inline To bits_as(From x) {
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}

// Stored as T, computed in C. The 16-bit forms are integer operations, which compilers turn into vectors everywhere.
template <class T> struct Codec {
    static inline C decode(T x) { return C(x); }
    static inline T encode(C x) { return T(x); }
};
template <> struct Codec<bfloat16> {
    static inline C decode(bfloat16 x) { return C(bits_as<float>(uint32_t(x.bits) << 16)); }
    static inline bfloat16 encode(C x) {
        const uint32_t bits = bits_as<uint32_t>(float(x));
        const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
        return bfloat16{uint16_t(x != x ? 0x7FC0u : rounded)};
    }
};
template <> struct Codec<float16> {
    static inline C decode(float16 x) {
        const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, low = x.bits & 0x7FFFu;
        const uint32_t normal = (low << 13) + (low < 0x7C00u ? 0x38000000u : 0x70000000u);  // exponent + 112; infinity, NaN + 224
        const uint32_t denormal = bits_as<uint32_t>(float(int32_t(low)) * 0x1p-24f);
        return C(bits_as<float>(sign | (low < 0x400u ? denormal : normal)));
    }
    static inline float16 encode(C x) {
        const uint32_t all = bits_as<uint32_t>(float(x)), sign = (all >> 16) & 0x8000u, bits = all & 0x7FFFFFFFu;
        const uint32_t normal = (bits - 0x38000000u + 0xFFFu + ((bits >> 13) & 1u)) >> 13;  // to nearest, ties to even
        const uint32_t denormal = bits_as<uint32_t>(bits_as<float>(bits) + 0.5f) - 0x3F000000u;  // a unit of 0.5f is 2^-24
        const uint32_t finite = bits < 0x38800000u ? denormal : bits < 0x47800000u ? normal : 0x7C00u;
        return float16{uint16_t(sign | (bits > 0x7F800000u ? 0x7E00u : finite))};
    }
};

static void block(V* __restrict variable, const G* __restrict gradient, @PARAMETERS@int64_t count, const C* f, const C* s) {
@CONSTANTS@
    #pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
@BODY@
    }
}

extern "C" void update(const Segment* segments, const int32_t* blocks, int64_t grid, const C* factors, C* const* slots,
                       const C* scalars, int32_t threads) {
    const int64_t fair = grid / (8 * int64_t(threads)), chunk = fair < 1 ? 1 : fair > 8 ? 8 : fair;
    #pragma omp parallel for schedule(dynamic, chunk) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < grid; ++i) {
        const int64_t index = blocks[2 * i], start = blocks[2 * i + 1] * int64_t(@BLOCK@);
        const Segment& row = segments[index];
        const int64_t left = row.numel - start, count = left < @BLOCK@ ? left : @BLOCK@;
        if (count > 0)
            block((V*)row.variable + start, (const G*)row.gradient + start, @ARGUMENTS@count, factors + 5 * index, scalars);
    }
}
"""


@functools.cache
def traced(function: types.FunctionType) -> Callable[..., Any]:
    """The rule as a function of `Value`s: its `op` is the C++ twin, in the functions it calls too."""

    def replace(value: Any) -> Any:
        if is_torch_op(value):
            return cpp_op
        return traced(value) if isinstance(value, types.FunctionType) else value

    return rebind(function, replace)


def source(rule: Any, prepare: Any, scalars: Any, slots: int, dtypes: tuple[torch.dtype, torch.dtype]) -> str:
    """The kernel's C++. dtypes: of the variable and of the gradient; scalars: the NamedTuple class of the step's scalars."""
    body: list[str] = []
    load = Value("", body).new
    p, g = load("Codec<V>::decode(variable[i])"), load("Codec<G>::decode(gradient[i])")
    values = tuple(load(f"slot{k}[i]") for k in range(slots))
    s = scalars(*(Value(f"s{k}", body) for k in range(len(scalars._fields))))
    new, values = traced(rule)(p, traced(prepare)(g, tuple(Value(f"f{k}", body) for k in range(5))), values, s)
    body.append(f"variable[i] = Codec<V>::encode({cpp_op.text(new)});")
    body += [f"slot{k}[i] = {cpp_op.text(value)};" for k, value in enumerate(values)]
    used = set(re.findall(r"\b[fs]\d+\b", "\n".join(body)))  # `keep` reads no factors, and none may be there
    constants = [f"const C {name} = {name[0]}[{name[1:]}];" for name in sorted(used)]
    parts = {
        "C": "double" if dtypes[0] == torch.float64 else "float",
        "V": TYPES[dtypes[0]],
        "G": TYPES[dtypes[1]],
        "BLOCK": str(BLOCK),
        "PARAMETERS": "".join(f"C* __restrict slot{k}, " for k in range(slots)),
        "ARGUMENTS": "".join(f"slots[{k}] + row.offset + start, " for k in range(slots)),
        "CONSTANTS": "\n".join(f"    {line}" for line in constants),
        "BODY": "\n".join(f"        {line}" for line in body),
    }
    return functools.reduce(lambda text, part: text.replace(f"@{part[0]}@", part[1]), parts.items(), _TEMPLATE)
