// One number of a tensor as float, and back, for loops that serve float32 and bfloat16.

#pragma once

#include "tiles.h"

static inline float load(float x) { return x; }
static inline float load(bf16 x) {
    uint32_t wide = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}
static inline void store(float *out, float x) { *out = x; }
static inline void store(bf16 *out, float x) {  // round to nearest even
    uint32_t wide;
    std::memcpy(&wide, &x, 4);
    wide += 0x7fff + ((wide >> 16) & 1);
    out->bits = uint16_t(wide >> 16);
}
