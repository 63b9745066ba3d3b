// The element-wise steps of a block for one row, computed in float. Whoever needs one calls the same function (elementwise.cpp has
// their text), which is never inlined: so every caller's last bits are the same.

#pragma once

#include "tiles.h"

// out = in · scale · weight with scale = 1 / sqrt(mean(in²) + epsilon), which it gives.
template <class T>
__attribute__((noinline)) float normalise(const T *in, const float *weight, T *out, int64_t width, float epsilon);

// y = silu(gate) · up.
template <class T>
__attribute__((noinline)) void silu_multiply_row(const T *gate, const T *up, T *y, int64_t width);

// `heads` heads of `channels`, each normalised by its own gains (of (heads, channels); null: not at all), then rotated by
// (channels / 2,) cosines and sines (null: not at all), rounded once at the end. `out` may be `in`; `room` holds `channels`.
template <class T>
__attribute__((noinline)) void place_row(const T *in, const float *gains, const float *cosines, const float *sines, T *out,
                                         int64_t heads, int64_t channels, float epsilon, float *room);
