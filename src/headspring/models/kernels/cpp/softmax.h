// The softmax of attention, for 16 queries in the lanes of a vector. One function for training, prompts and single tokens:
// a lane's result depends on nothing but that lane's scores, so that all of them agree to the last bit.

#pragma once

#include "tiles.h"

#ifdef HAS_PRODUCTS

static inline integers places(int64_t start) {
    integers count = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return count + int32_t(start);
}

// 16 queries at their places, each of which sees the keys from `first` to itself, and the stretch of keys that all of them
// see: only outside of it is a mask needed.
struct Queries {
    integers place, first;
    int64_t shared_begin, shared_end;
    Queries(integers place, integers first)
        : place(place), first(first), shared_begin(_mm512_reduce_max_epi32((__m512i)first)),
          shared_end(_mm512_reduce_min_epi32((__m512i)place) + 1) {}
    floats seen(floats x, int64_t key, float otherwise) const {
        if (key >= shared_begin && key < shared_end) return x;
        return (first <= int32_t(key)) & (place >= int32_t(key)) ? x : floats{} + otherwise;
    }
};

// Scores of 16 queries and the keys begin … end − 1 (`begin` and `end` multiples of 32; a row of `stride` elements for each
// key) → exp(scale · score − maximum) as pairs of keys, which may take the scores' own place. Gives what the sum of these
// must be multiplied with, and where `log2_sums` is not null, log2 of sum · exp(maximum).
__attribute__((noinline)) floats softmax(const float *scores, uint32_t *out, int64_t stride, int64_t begin, int64_t end,
                                         const Queries &queries, float scale, floats *log2_sums);

#endif
