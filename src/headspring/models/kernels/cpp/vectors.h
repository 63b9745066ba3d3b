// Sixteen numbers of a tensor at a time, for the loops that compilers do not vectorise well: those that turn bfloat16 to float and
// back, and those with exponentials. Where the processor has no vectors of this length, the compiler makes them of shorter ones.

#pragma once

#include "numbers.h"

typedef uint16_t halves __attribute__((vector_size(32)));

static inline floats widened(halves bits) { return (floats)(__builtin_convertvector(bits, words) << 16); }
static inline halves narrowed(floats x) {  // to nearest even
#ifdef HAS_PRODUCTS
    return (halves)(__m256i)_mm512_cvtneps_pbh((__m512)x);
#else
    words wide = (words)x;
    wide += 0x7fff + ((wide >> 16) & 1);
    return __builtin_convertvector(wide >> 16, halves);
#endif
}

// The first `count` of 16 elements; zeros stand for the rest.
static inline floats load16(const float *from, int64_t count) {
    if (count >= 16) return read<floats>(from);
    floats x = {};
    std::memcpy(&x, from, count * sizeof(float));
    return x;
}
static inline floats load16(const bf16 *from, int64_t count) {
    if (count >= 16) return widened(read<halves>(from));
    halves bits = {};
    std::memcpy(&bits, from, count * sizeof(bf16));
    return widened(bits);
}

static inline void store16(float *to, floats x, int64_t count) {
    if (count >= 16) return write(to, x);
    std::memcpy(to, &x, count * sizeof(float));
}
static inline void store16(bf16 *to, floats x, int64_t count) {
    const halves bits = narrowed(x);
    if (count >= 16) return write(to, bits);
    std::memcpy(to, &bits, count * sizeof(bf16));
}

static inline float sum_of(floats x) {  // in one order everywhere
    float sum = 0;
    for (int lane = 0; lane < 16; lane++) sum += x[lane];
    return sum;
}

// exp(x) for any x: 2^(x log2 e) by a polynomial on the fraction, relative error below 3e-7. NaN stays NaN.
static inline floats exp_of(floats x) {
    x = x < -87.0f ? floats{} - 87.0f : x;
    x = x > 88.0f ? floats{} + 88.0f : x;
    const floats scaled = x * 1.44269504089f;
    const integers whole = __builtin_convertvector(scaled + (scaled < 0.0f ? floats{} - 0.5f : floats{} + 0.5f), integers);
    const floats n = __builtin_convertvector(whole, floats);
    const floats f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    floats p = 1.9875691500e-4f * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    return p * (floats)((whole + 127) << 23);
}
