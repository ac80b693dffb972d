"""The C++ of the kernels, but for the parts between @ that `kernels.cpp` fills in."""

HEAD = """
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __F16C__
#include <immintrin.h>
#endif

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };
using C = @C@; using V = @V@; using G = @G@;@TYPES@

struct Segment { int64_t variable, gradient, numel, slots[@SLOTS@]; };

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

"""

UPDATE = """
// How a loop reads and writes elements: where they are, or, float16, through a buffer and the processor's conversions, which
// compilers do not find in the integer form above. That form alone is slower than memory.
template <class T> struct Stage {
    using Type = T;
    template <class P> P in(P from, int64_t) { return from; }
    void out(T*, int64_t) {}
};
#ifdef __F16C__
template <> struct Stage<float16> {
    using Type = float;
    float buffer[@STAGE@];
    float* in(const float16* from, int64_t count) {
        int64_t i = 0;
        for (; i + 8 <= count; i += 8) _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
        for (; i < count; ++i) buffer[i] = float(Codec<float16>::decode(from[i]));
        return buffer;
    }
    void out(float16* to, int64_t count) {
        int64_t i = 0;
        for (; i + 8 <= count; i += 8) _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(buffer + i), 0));
        for (; i < count; ++i) to[i] = Codec<float16>::encode(C(buffer[i]));
    }
};
#endif

static void block(V* variable, const G* gradient, @PARAMETERS@int64_t count, const C* f, const C* s@SUMS@) {
@CONSTANTS@
    Stage<V> variables;
    Stage<G> gradients;
@STAGES@
    for (int64_t at = 0; at < count; at += @STAGE@) {
        const int64_t n = count - at < @STAGE@ ? count - at : @STAGE@;
        auto* __restrict v = variables.in(variable + at, n);
        const auto* __restrict g = gradients.in(gradient + at, n);
@VIEWS@
@LOOPS@
        variables.out(variable + at, n);
@WRITTEN@
    }@SUMMED@
}

extern "C" void update(const Segment* segments, const int32_t* blocks, int64_t grid, const C* factors, const C* scalars,
                       int64_t stride@SUMS@, int32_t threads) {
    const int64_t fair = grid / (8 * int64_t(threads)), chunk = fair < 1 ? 1 : fair > 8 ? 8 : fair;
    #pragma omp parallel for schedule(dynamic, chunk) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < grid; ++i) {
        const int64_t index = blocks[2 * i], start = blocks[2 * i + 1] * int64_t(@BLOCK@);
        const Segment& row = segments[index];
        const int64_t left = row.numel - start, count = left < @BLOCK@ ? left : @BLOCK@;
        if (count > 0)
            block((V*)row.variable + start, (const G*)row.gradient + start, @ARGUMENTS@count, factors + 5 * index,
                  scalars + stride * index@ROW@);
    }
}
"""


# The order of the sums is that of `fused_kopt.norms`; zeros beyond the next power of two are left out, they change nothing.
NORMS = """
static double summed(double* __restrict s, int64_t count) {
    int64_t length = 1;
    while (length < count) length *= 2;
    for (int64_t i = count; i < length; ++i) s[i] = 0;
    for (; length > 1024; length /= 2) {
        #pragma omp simd
        for (int64_t i = 0; i < length / 2; ++i) s[i] += s[i + length / 2];
    }
    for (; length > 1; length /= 2)
        for (int64_t i = 0; i < length / 2; ++i) s[i] = s[2 * i] + s[2 * i + 1];
    return s[0];
}

static double block(const G* __restrict gradient, int64_t count, const C* f) {
@CONSTANTS@
    double squares[@BLOCK@];
    #pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
@BODY@
    }
    return summed(squares, count);
}

extern "C" void square_norms(const Segment* segments, const int32_t* blocks, int64_t grid, const C* factors, double* sums,
                             int32_t threads) {
    #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < grid; ++i) {
        const Segment& row = segments[blocks[2 * i]];
        const int64_t start = blocks[2 * i + 1] * int64_t(@BLOCK@), left = row.numel - start;
        sums[i] = left > 0 ? block((const G*)row.gradient + start, left < @BLOCK@ ? left : @BLOCK@, factors) : 0;
    }
}

extern "C" void fold(const double* values, const int64_t* starts, int64_t count, double* sums) {
    for (int64_t i = 0; i < count; ++i) {
        const int64_t length = starts[i + 1] - starts[i], lanes = length < 1024 ? length : 1024;
        double total[1024];
        std::memset(total, 0, lanes * sizeof *total);  // of 5,000 small gradients, 8 KiB each took longer than their sums
        for (int64_t k = 0; k < length; ++k) total[k % 1024] += values[starts[i] + k];
        sums[i] = lanes ? summed(total, lanes) : 0;
    }
}
"""
