// Attention over pages: queries of many sequences, whose keys and values lie in pages of 32 tokens that tables name.
//
// The query rows of a sequence, times the heads that share keys, are the lanes of strips of 16 or 32: a single new token
// puts its heads side by side, a prompt its rows as well. What a strip computes is what attention.cpp computes of
// its queries, bit for bit: the same products in the same order of channels and of keys, and the same softmax.

#pragma once

#include "softmax.h"

#ifdef HAS_PRODUCTS

#include <algorithm>
#include <vector>

constexpr int64_t PAGE = 32;  // tokens

// A step's sequences: of sequence i the rows offsets[i] … offsets[i + 1] − 1, which follow past[i] tokens in pages.
struct Ragged {
    const int32_t *tables;
    int64_t pages, sequences;  // the tables are (sequences, pages)
    const int64_t *offsets, *past;
    int64_t rows() const { return offsets[sequences]; }
};

// Keys (pages, heads, PAGE, channels) and values (pages, heads, channels, PAGE): bf16, or int8 where there are scales
// (pages, heads, PAGE), one for each token's vector.
struct Pages {
    void *keys, *values;
    float *key_scales, *value_scales;
    int64_t heads, channels;
    int64_t at(int64_t page, int64_t head) const { return (page * heads + head) * PAGE; }
};

// Rows of heads, side by side; `ld` elements from one row to the next.
struct Rows {
    bf16 *data;
    int64_t ld;
};

struct Strip {
    int64_t sequence, head, lane;
};

// What there is to do for one layer, the long ones of a sequence first. The same for all layers of a step.
static inline std::vector<Strip> strips(const Ragged &step, int64_t heads, int64_t kv_heads) {
    std::vector<Strip> found;
    for (int64_t i = 0; i < step.sequences; i++) {
        int64_t lanes = (step.offsets[i + 1] - step.offsets[i]) * (heads / kv_heads);
        for (int64_t lane = (lanes - 1) / 32 * 32; lane >= 0; lane -= 32)
            for (int64_t head = 0; head < kv_heads && lanes; head++) found.push_back({i, head, lane});
    }
    return found;
}

// Memory of a thread that only grows, so that a step need not ask for it anew.
template <class T>
struct Growing {
    Buffer<T> buffer{0};
    int64_t size = 0;
    T *of(int64_t count) {
        if (count > size) {
            std::free(buffer.data);
            buffer.data = (T *)std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64);
            size = count;
        }
        return buffer.data;
    }
    T *data() const { return buffer.data; }
};

// x (32, C) or (C, 32) of a page times `right` (K / 2, LANES) pairs, for LANES 16 or 32. `scored`: the scores of a page's
// keys; `weighed`: sums over pages of values, in their order.
#ifdef __AMX_BF16__

template <int64_t LANES>
static inline void scored(const bf16 *keys, const uint32_t *queries, float *scores, int64_t channels) {
    if (LANES == 32) return multiply(keys, channels, queries, LANES, scores, LANES, PAGE, LANES, channels, false);
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t c = 0; c < channels; c += 32) {
        _tile_loadd(4, keys + c, channels * 2);
        _tile_loadd(5, keys + 16 * channels + c, channels * 2);
        _tile_loadd(6, queries + c / 2 * LANES, LANES * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
    }
    _tile_stored(0, scores, LANES * 4);
    _tile_stored(1, scores + 16 * LANES, LANES * 4);
}

template <int64_t LANES>
static inline void weighed(const bf16 *const *values, int64_t count, const uint32_t *pattern, float *mixed, int64_t channels,
                           bool add) {
    constexpr int64_t ROW = LANES * 4;
    for (int64_t c = 0; c < channels; c += 32) {
        float *upper = mixed + c * LANES, *lower = upper + 16 * LANES;
        if (add) {
            _tile_loadd(0, upper, ROW);
            _tile_loadd(1, lower, ROW);
            if (LANES == 32) _tile_loadd(2, upper + 16, ROW);
            if (LANES == 32) _tile_loadd(3, lower + 16, ROW);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int64_t i = 0; i < count; i++) {
            const uint32_t *right = pattern + i * PAGE / 2 * LANES;
            _tile_loadd(4, values[i] + c * PAGE, PAGE * 2);
            _tile_loadd(5, values[i] + (c + 16) * PAGE, PAGE * 2);
            _tile_loadd(6, right, ROW);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
            if (LANES == 32) {
                _tile_loadd(7, right + 16, ROW);
                _tile_dpbf16ps(2, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, upper, ROW);
        _tile_stored(1, lower, ROW);
        if (LANES == 32) _tile_stored(2, upper + 16, ROW);
        if (LANES == 32) _tile_stored(3, lower + 16, ROW);
    }
}

#else

// Of 16 / V rows, `ld` elements apart: sums (V vectors a row) += their pairs times `right` (depth / 2, 16 V) pairs.
template <int64_t V>
static inline void add_pairs(const bf16 *left, int64_t ld, const uint32_t *right, int64_t depth, __m512 (&sums)[16 / V][V]) {
    for (int64_t k = 0; k < depth; k += 2) {
        __m512bh pair[V];
        for (int v = 0; v < V; v++) pair[v] = (__m512bh)_mm512_loadu_si512(right + k / 2 * 16 * V + 16 * v);
#pragma GCC unroll 16
        for (int i = 0; i < 16 / V; i++) {
            __m512bh both = (__m512bh)_mm512_set1_epi32(read<int32_t>(left + i * ld + k));
            for (int v = 0; v < V; v++) sums[i][v] = _mm512_dpbf16_ps(sums[i][v], both, pair[v]);
        }
    }
}

template <int64_t LANES>
static inline void scored(const bf16 *keys, const uint32_t *queries, float *scores, int64_t channels) {
    constexpr int64_t V = LANES / 16, ROWS = 16 / V;
    for (int64_t row = 0; row < PAGE; row += ROWS) {
        __m512 sums[ROWS][V] = {};
        add_pairs<V>(keys + row * channels, channels, queries, channels, sums);
        std::memcpy(scores + row * LANES, sums, sizeof sums);
    }
}

template <int64_t LANES>
static inline void weighed(const bf16 *const *values, int64_t count, const uint32_t *pattern, float *mixed, int64_t channels,
                           bool add) {
    constexpr int64_t V = LANES / 16, ROWS = 16 / V;
    for (int64_t c = 0; c < channels; c += ROWS) {
        __m512 sums[ROWS][V] = {};
        if (add) std::memcpy(sums, mixed + c * LANES, sizeof sums);
        for (int64_t i = 0; i < count; i++)
            add_pairs<V>(values[i] + c * PAGE, PAGE, pattern + i * PAGE / 2 * LANES, PAGE, sums);
        std::memcpy(mixed + c * LANES, sums, sizeof sums);
    }
}

#endif

// One thread's part of the attention of a layer.
class PagedAttention {
  public:
    // `window` 0 is none.
    void compute(const Strip &strip, const Ragged &step, const Pages &pages, const Rows &q, const Rows &out, int64_t heads,
                 int64_t window, float scale) {
        int64_t group = heads / pages.heads;
        int64_t lanes = (step.offsets[strip.sequence + 1] - step.offsets[strip.sequence]) * group - strip.lane;
        if (lanes > 16)
            compute<32>(strip, step, pages, q, out, group, std::min<int64_t>(lanes, 32), window, scale);
        else
            compute<16>(strip, step, pages, q, out, group, lanes, window, scale);
    }

  private:
    static constexpr int64_t TOGETHER = 8;  // pages whose values are at hand at a time

    Growing<bf16> gathered_, held_, result_;
    Growing<uint32_t> queries_;
    Growing<float> scores_, mixed_;

    template <int64_t LANES>
    void compute(const Strip &strip, const Ragged &step, const Pages &pages, const Rows &q, const Rows &out, int64_t group,
                 int64_t lanes, int64_t window, float scale) {
        const int64_t C = pages.channels, offset = step.offsets[strip.sequence], past = step.past[strip.sequence];
        const int64_t written = past + step.offsets[strip.sequence + 1] - offset;
        const int32_t *table = step.tables + strip.sequence * step.pages;
        bf16 *gathered = gathered_.of(LANES * C), *result = result_.of(LANES * C);
        int32_t place[LANES], first[LANES];
        for (int64_t l = 0; l < LANES; l++) {  // lanes that are left over repeat the last one
            int64_t lane = strip.lane + std::min(l, lanes - 1), row = lane / group;
            place[l] = int32_t(past + row);
            first[l] = window ? std::max<int32_t>(0, place[l] - int32_t(window) + 1) : 0;
            std::memcpy(gathered + l * C, q.data + (offset + row) * q.ld + (strip.head * group + lane % group) * C, C * 2);
        }
        uint32_t *queries = queries_.of(C / 2 * LANES);
        pairs_of_transposed(gathered, C, LANES, queries, LANES, LANES, C);

        const int64_t begin = first[0] / PAGE, end = place[LANES - 1] / PAGE + 1;  // pages
        float *scores = scores_.of((end - begin) * PAGE * LANES), *mixed = mixed_.of(C * LANES), factors[LANES];
        bf16 *held = held_.of(TOGETHER * PAGE * C);
        for (int64_t p = begin; p < end; p++) {
            int64_t at = pages.at(table[p], strip.head);
            const bf16 *keys = pages.key_scales ? opened_keys(pages, at, held) : (const bf16 *)pages.keys + at * C;
            scored<LANES>(keys, queries, scores + (p - begin) * PAGE * LANES, C);
        }
        uint32_t *pattern = (uint32_t *)scores;
        for (int64_t i = 0; i < LANES; i += 16)
            write(factors + i, softmax(scores + i, pattern + i, LANES, begin * PAGE, end * PAGE,
                                       Queries(read<integers>(place + i), read<integers>(first + i)), scale, nullptr));
        for (int64_t p = begin; p < end; p += TOGETHER) {
            const bf16 *values[TOGETHER];
            int64_t count = std::min(TOGETHER, end - p);
            for (int64_t i = 0; i < count; i++) {
                int64_t at = pages.at(table[p + i], strip.head), tokens = written - (p + i) * PAGE;
                bool whole = tokens >= PAGE && !pages.value_scales;
                values[i] = whole ? (const bf16 *)pages.values + at * C : opened_values(pages, at, tokens, held + i * PAGE * C);
            }
            weighed<LANES>(values, count, pattern + (p - begin) * PAGE / 2 * LANES, mixed, C, p > begin);
        }
        transposed_to_bf16(mixed, LANES, result, C, LANES, C, factors);
        for (int64_t l = 0; l < lanes; l++) {
            int64_t lane = strip.lane + l;
            std::memcpy(out.data + (offset + lane / group) * out.ld + (strip.head * group + lane % group) * C, result + l * C,
                        C * 2);
        }
    }

    static floats read_int8(const int8_t *from) {
        return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
    }

    static const bf16 *opened_keys(const Pages &pages, int64_t at, bf16 *out) {
        const int8_t *keys = (const int8_t *)pages.keys + at * pages.channels;
        for (int64_t t = 0; t < PAGE; t++)
            for (int64_t c = 0; c < pages.channels; c += 16)
                write_bf16(out + t * pages.channels + c, read_int8(keys + t * pages.channels + c) * pages.key_scales[at + t]);
        return out;
    }

    // The values of a page's first `tokens`, and zeros: what nobody has written may be NaN, and NaN times 0 is NaN.
    static const bf16 *opened_values(const Pages &pages, int64_t at, int64_t tokens, bf16 *out) {
        __mmask32 valid = tokens >= PAGE ? ~0u : (1u << tokens) - 1;
        for (int64_t c = 0; c < pages.channels; c++) {
            int64_t from = (at * pages.channels) + c * PAGE;
            if (pages.value_scales) {
                const int8_t *values = (const int8_t *)pages.values + from;
                const float *scales = pages.value_scales + at;
                write_bf16(out + c * PAGE, read_int8(values) * read<floats>(scales));
                write_bf16(out + c * PAGE + 16, read_int8(values + 16) * read<floats>(scales + 16));
            } else
                std::memcpy(out + c * PAGE, (const bf16 *)pages.values + from, PAGE * 2);
            _mm512_storeu_si512(out + c * PAGE, _mm512_maskz_loadu_epi16(valid, out + c * PAGE));
        }
        return out;
    }
};

// a / b itself, where the compiler is free to multiply by 1 / b instead.
static inline floats divided(floats a, floats b) { return (floats)_mm512_maskz_div_ps(0xffff, (__m512)a, (__m512)b); }

// The keys and values of one row and key–value head into their page: as they are, or as int8 with scale = max |x| / 127.
static inline void write_page(const Pages &pages, int64_t slot, int64_t head, const bf16 *key, const bf16 *value) {
    const int64_t C = pages.channels, at = pages.at(slot / PAGE, head), place = slot % PAGE;
    if (!pages.key_scales) {
        std::memcpy((bf16 *)pages.keys + (at + place) * C, key, C * 2);
        bf16 *values = (bf16 *)pages.values + at * C + place;
        for (int64_t c = 0; c < C; c++) values[c * PAGE] = value[c];
        return;
    }
    int8_t *keys = (int8_t *)pages.keys + (at + place) * C, *values = (int8_t *)pages.values + at * C + place;
    const bf16 *vectors[] = {key, value};
    float *scales[] = {pages.key_scales + at + place, pages.value_scales + at + place};
    for (int which = 0; which < 2; which++) {
        floats largest = {};
        for (int64_t c = 0; c < C; c += 16)
            largest = (floats)_mm512_max_ps((__m512)largest, _mm512_abs_ps((__m512)read_bf16(vectors[which] + c)));
        floats scale = divided(floats{} + _mm512_reduce_max_ps((__m512)largest), floats{} + 127.0f);
        *scales[which] = scale[0];
        scale = scale > 1e-30f ? scale : floats{} + 1e-30f;
        for (int64_t c = 0; c < C; c += 16) {
            alignas(16) int8_t narrow[16];
            __m512i whole = _mm512_cvtps_epi32((__m512)divided(read_bf16(vectors[which] + c), scale));  // to nearest even
            _mm_store_si128((__m128i *)narrow, _mm512_cvtsepi32_epi8(whole));
            if (which == 0)
                std::memcpy(keys + c, narrow, 16);
            else
                for (int64_t i = 0; i < 16; i++) values[(c + i) * PAGE] = narrow[i];
        }
    }
}

#endif
