// Products y = x Wᵀ with a packed W: a row of y depends on its row of x alone, summed in one order, bit for bit.
//
// General libraries choose a kernel by the number of rows, so that a token's last bits depend on its company. Here one panel
// of 32 outputs is multiplied in the same order of inputs whatever the rows, threads and tails are:
//   bf16    float32 sums over pairs of inputs, in order, by one kind of instruction (AMX tiles, else AVX-512 dot products)
//   int8    one scale an output, one a row of x; integer sums are exact, so few rows may take another instruction than many
//   groups  8 or 4 bits, a scale (and a minimum) for each group of inputs, of x as well; float32 sums over groups, in order
//
// Layout: panels of 32 outputs, one after the other; in a panel, a line for each 32 bits of inputs (2, 4 or 8 of them):
//   bf16 (inputs / 2, 32) pairs · 8 bits (inputs / 4, 32) fours · 4 bits (inputs / 4, 16) fours, output n in the low half of
//   each byte and n + 16 in the high half. Weights of integer kinds are unsigned: value + offset.
// A panel is read from front to back, which is what memory does fastest; both AMX and AVX-512 read it as it is.
// What this gives up: a copy of the weights in this layout, and single-row products of a library that may split the sum.

#pragma once

#include "tiles.h"

#include <algorithm>

constexpr int64_t PANEL = 32;
enum Kind : int32_t { BF16 = 0, INT8 = 1, GROUPS = 2 };

// The mirror of `PackedMatrix` (packed.py). `inputs` and `outputs` are those of the matrix; the layout is padded with zeros.
struct Packed {
    int32_t kind, bits;
    int64_t outputs, inputs, group;  // `group` inputs share a scale; int8 by channel: all of them
    const void *values;
    const float *scales;    // int8: (padded outputs,); groups: (panels, groups, 32)
    const float *minimums;  // groups: as `scales`, or null
    int64_t offset;         // what was added to integer values

    int64_t padded() const {  // inputs in the layout
        int64_t whole = kind == BF16 ? 32 : std::max<int64_t>(64, kind == GROUPS ? group : 0);
        return (inputs + whole - 1) / whole * whole;
    }
    int64_t groups() const { return kind == GROUPS ? padded() / group : 1; }
    int64_t panels() const { return (outputs + PANEL - 1) / PANEL; }
    int64_t panel_bytes() const { return padded() * PANEL * (kind == BF16 ? 16 : bits) / 8; }
    const uint8_t *panel(int64_t p) const { return (const uint8_t *)values + p * panel_bytes(); }
};

#if defined(HAS_PRODUCTS) && defined(__AVX512VNNI__)
#define HAS_PACKED_PRODUCTS 1

// What `arrange` makes of rows of x, shared by the threads of one product. Made before them; may serve products one after the
// other with at most `rows` rows and `inputs` inputs.
struct Scratch {
    Buffer<uint8_t> memory;
    int64_t rows, padded;
    const bf16 *x = nullptr;  // bf16: the rows themselves, or their copy with zeros at the end
    int64_t ld = 0;           // of `x` and of `bytes`, in elements

    Scratch(int64_t rows, int64_t inputs)
        : memory(rows * ((inputs + 127) / 128 * 128) * 3 + 256), rows(rows), padded((inputs + 127) / 128 * 128) {}
    int8_t *bytes() const { return (int8_t *)memory.data; }                          // (rows, padded)
    float *scales() const { return (float *)(memory.data + rows * padded); }         // (rows, groups): x ≈ scale · byte
    float *sums() const { return scales() + rows * (padded / 16); }                  // scale · Σ bytes
    int32_t *starts() const { return (int32_t *)(sums() + rows * (padded / 16)); }   // − offset · Σ bytes
};

// Keeps the compiler from contracting or reordering across this value.
static inline floats settled(floats x) {
    asm("" : "+v"(x));
    return x;
}
static inline floats spread(float x) { return (floats)_mm512_set1_ps(x); }
static inline __mmask16 lanes(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1); }
static inline floats read_some(const float *from, int64_t count) {
    return (floats)_mm512_maskz_loadu_ps(lanes(count), from);
}
static inline floats read_some(const bf16 *from, int64_t count) {
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes(count), from)), 16);
}
static inline void write_some(float *to, floats x, int64_t count) { _mm512_mask_storeu_ps(to, lanes(count), (__m512)x); }
static inline void write_some(bf16 *to, floats x, int64_t count) {
    _mm256_mask_storeu_epi16(to, lanes(count), (__m256i)_mm512_cvtneps_pbh((__m512)x));
}
static inline floats rounded(floats x, const float *) { return x; }
static inline floats rounded(floats x, const bf16 *) {
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)), 16);
}

// ---- rows of x

// One row: for each group, scale = max|x| / 127 and bytes = x / scale, rounded to even. A NaN makes its scale NaN.
template <class T>
static inline void quantize_row(const T *x, const Packed &w, int8_t *bytes, float *scales, float *sums, int32_t *starts) {
    const int64_t padded = w.padded(), groups = w.groups(), size = padded / groups;
    for (int64_t g = 0; g < groups; g++) {
        const int64_t from = g * size, to = from + size;
        __m512i largest = _mm512_setzero_si512();  // as bit patterns, of which NaN is the largest
        for (int64_t i = from; i < to; i += 16) {
            __m512i bits = _mm512_and_si512((__m512i)read_some(x + i, w.inputs - i), _mm512_set1_epi32(0x7fffffff));
            largest = _mm512_max_epu32(largest, bits);
        }
        uint32_t bits = _mm512_reduce_max_epu32(largest);
        float maximum;
        std::memcpy(&maximum, &bits, 4);
        floats inverse = settled(spread(maximum < 1e-30f ? 0.0f : 127.0f / maximum));
        __m512i sum = _mm512_setzero_si512();
        for (int64_t i = from; i < to; i += 16) {
            floats scaled = settled(read_some(x + i, w.inputs - i) * inverse);
            __m512i whole = _mm512_cvtps_epi32((__m512)scaled);
            _mm_storeu_si128((__m128i *)(bytes + i), _mm512_cvtsepi32_epi8(whole));
            sum = _mm512_add_epi32(sum, whole);
        }
        int32_t total = _mm512_reduce_add_epi32(sum);
        scales[g] = maximum * (1.0f / 127.0f);
        sums[g] = scales[g] * float(total);
        starts[g] = -int32_t(w.offset) * total;
    }
}

// Brings rows of x (`ld` elements apart) into the form that `product` reads. Called by every thread of a region, followed by a
// barrier of the caller. Where x can be read as it is (bf16, whole lines), it must stay until the product is done.
template <class T>
static inline void arrange(const T *x, int64_t ld, int64_t rows, const Packed &w, Scratch &scratch, int thread, int threads) {
    const int64_t start = rows * thread / threads, end = rows * (thread + 1) / threads;
    if (w.kind != BF16) {
        const int64_t padded = w.padded(), groups = w.groups();
        for (int64_t r = start; r < end; r++)
            quantize_row(x + r * ld, w, scratch.bytes() + r * padded, scratch.scales() + r * groups,
                         scratch.sums() + r * groups, scratch.starts() + r * groups);
        if (thread == 0) scratch.ld = padded;
        return;
    }
    if constexpr (sizeof(T) == 2) {
        const int64_t padded = w.padded();
        const bool copied = padded != w.inputs;
        bf16 *copy = (bf16 *)scratch.memory.data;
        if (thread == 0) scratch.x = copied ? copy : x, scratch.ld = copied ? padded : ld;
        for (int64_t r = start; copied && r < end; r++) {
            std::memcpy(copy + r * padded, x + r * ld, w.inputs * 2);
            std::memset(copy + r * padded + w.inputs, 0, (padded - w.inputs) * 2);
        }
    }
}

// ---- what becomes of sums

// Where the results go, and what is added to them after each rounding, as separate operators would: bias, then `add`.
template <class T>
struct Output {
    T *y;
    int64_t ld;
    const T *bias, *add;
    int64_t ld_add, outputs;

    // 16 results of row m from output n.
    inline void put(int64_t m, int64_t n, floats x) const {
        const int64_t count = outputs - n;
        if (bias) x = settled(rounded(x, y)) + read_some(bias + n, count);
        if (add) x = settled(rounded(x, y)) + read_some(add + m * ld_add + n, count);
        write_some(y + m * ld + n, x, count);
    }
    // 32 results of row m.
    inline void put_panel(int64_t m, int64_t p, const float *sums) const {
        if constexpr (sizeof(T) == 2)
            if (!bias && !add && outputs - p * PANEL >= PANEL) {
                write(y + m * ld + p * PANEL, _mm512_cvtne2ps_pbh(_mm512_load_ps(sums + 16), _mm512_load_ps(sums)));
                return;
            }
        put(m, p * PANEL, read<floats>(sums));
        put(m, p * PANEL + 16, read<floats>(sums + 16));
    }
};

// int8 by channel: Σ bytes · values → y.
static inline floats scaled(__m512i sum, int64_t row, int64_t n, const Packed &w, const Scratch &scratch) {
    floats factor = settled(spread(scratch.scales()[row]) * read<floats>(w.scales + n));
    return (floats)_mm512_cvtepi32_ps(sum) * factor;
}
// The sum over groups so far, and one more: a product and a sum, each rounded.
static inline floats with_group(floats total, __m512i sum, float row_scale, float row_sum, const float *scale,
                                const float *minimum) {
    floats factor = settled(spread(row_scale) * read<floats>(scale));
    total = settled(total + settled((floats)_mm512_cvtepi32_ps(sum) * factor));
    return minimum ? settled(total + settled(spread(row_sum) * read<floats>(minimum))) : total;
}

// ---- integer kinds, few rows: dot products of four bytes

template <int BITS>
static inline void weights_of(const uint8_t *panel, int64_t line, __m512i &low, __m512i &high) {
    if (BITS == 8) {
        low = _mm512_loadu_si512(panel + line * 128);
        high = _mm512_loadu_si512(panel + line * 128 + 64);
    } else {
        const __m512i both = _mm512_loadu_si512(panel + line * 64), mask = _mm512_set1_epi8(15);
        low = _mm512_and_si512(both, mask);
        high = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
    }
}

// ROWS rows from `row`, one panel.
template <int ROWS, int BITS, class T>
static inline void integer_panel(const Packed &w, const Scratch &scratch, int64_t row, int64_t p, const Output<T> &out) {
    const int64_t groups = w.groups(), lines = w.padded() / 4 / groups;
    const uint8_t *panel = w.panel(p);
    const int8_t *bytes = scratch.bytes() + row * scratch.ld;
    floats total[ROWS][2] = {};
    __m512i sum[ROWS][2];
    for (int64_t g = 0; g < groups; g++) {
        for (int r = 0; r < ROWS; r++) sum[r][0] = sum[r][1] = _mm512_set1_epi32(scratch.starts()[(row + r) * groups + g]);
        for (int64_t line = g * lines; line < (g + 1) * lines; line++) {
            __m512i low, high;
            weights_of<BITS>(panel, line, low, high);
            _mm_prefetch((const char *)panel + line * BITS * 16 + 4096, _MM_HINT_T0);
            if (BITS == 8) _mm_prefetch((const char *)panel + line * 128 + 4160, _MM_HINT_T0);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                __m512i four = _mm512_set1_epi32(read<int32_t>(bytes + r * scratch.ld + line * 4));
                sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], low, four);
                sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], high, four);
            }
        }
        if (w.kind == GROUPS)
            for (int r = 0; r < ROWS; r++)
                for (int half = 0; half < 2; half++) {
                    const int64_t at = (p * groups + g) * PANEL + half * 16, of_row = (row + r) * groups + g;
                    total[r][half] = with_group(total[r][half], sum[r][half], scratch.scales()[of_row],
                                                scratch.sums()[of_row], w.scales + at, w.minimums ? w.minimums + at : nullptr);
                }
    }
    for (int r = 0; r < ROWS; r++)
        for (int half = 0; half < 2; half++) {
            const int64_t n = p * PANEL + half * 16;
            out.put(row + r, n, w.kind == GROUPS ? total[r][half] : scaled(sum[r][half], row + r, n, w, scratch));
        }
}

template <int BITS, class T>
static inline void integer_rows(const Packed &w, const Scratch &scratch, int64_t row, int64_t end, int64_t p,
                                const Output<T> &out) {
    for (; row + 4 <= end; row += 4) integer_panel<4, BITS>(w, scratch, row, p, out);
    if (end - row == 3) integer_panel<3, BITS>(w, scratch, row, p, out);
    if (end - row == 2) integer_panel<2, BITS>(w, scratch, row, p, out);
    if (end - row == 1) integer_panel<1, BITS>(w, scratch, row, p, out);
}

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
#include "product_tiles.h"
#else

// ---- no tiles: bfloat16 dot products, in order

template <int ROWS, class T>
static inline void pair_panel(const Packed &w, const Scratch &scratch, int64_t row, int64_t p, const Output<T> &out) {
    __m512 sum[ROWS][2];
    for (int r = 0; r < ROWS; r++) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    const uint8_t *panel = w.panel(p);
    const bf16 *x = scratch.x + row * scratch.ld;
    const int64_t lines = w.padded() / 2;
    for (int64_t line = 0; line < lines; line++) {
        const __m512bh low = (__m512bh)_mm512_loadu_si512(panel + line * 128);
        const __m512bh high = (__m512bh)_mm512_loadu_si512(panel + line * 128 + 64);
        _mm_prefetch((const char *)panel + line * 128 + 4096, _MM_HINT_T0);
        _mm_prefetch((const char *)panel + line * 128 + 4160, _MM_HINT_T0);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(read<int32_t>(x + r * scratch.ld + line * 2));
            sum[r][0] = _mm512_dpbf16_ps(sum[r][0], pair, low);
            sum[r][1] = _mm512_dpbf16_ps(sum[r][1], pair, high);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int half = 0; half < 2; half++) out.put(row + r, p * PANEL + half * 16, (floats)sum[r][half]);
}

// Rows and panels that one thread computes.
template <class T>
static inline void product_block(const Packed &w, const Scratch &scratch, int64_t row, int64_t end, int64_t panel,
                                 int64_t last_panel, const Output<T> &out) {
    for (int64_t p = panel; p < last_panel; p++) {
        if (w.kind != BF16) {
            w.bits == 8 ? integer_rows<8>(w, scratch, row, end, p, out) : integer_rows<4>(w, scratch, row, end, p, out);
            continue;
        }
        int64_t r = row;
        for (; r + 8 <= end; r += 8) pair_panel<8>(w, scratch, r, p, out);
        for (; r + 4 <= end; r += 4) pair_panel<4>(w, scratch, r, p, out);
        for (; r < end; r++) pair_panel<1>(w, scratch, r, p, out);
    }
}

#endif

// The thread's share of y (rows, outputs), whose rows are `ld` apart, for the rows that `arrange` has read. `bias` (outputs,)
// and `add` (rows, outputs), each null or added after the product is rounded to T, as an operator of its own would.
// Holds the tile registers while it runs: the caller must not.
template <class T>
static inline void product(const Packed &w, const Scratch &scratch, T *y, int64_t ld, int64_t rows, int thread, int threads,
                           const T *add = nullptr, const T *bias = nullptr, int64_t ld_add = 0) {
    const Output<T> out{y, ld, bias, add, ld_add ? ld_add : w.outputs, w.outputs};
    // Many rows of a matrix that fits the cache are shared out by rows, all else by panels. No result depends on it.
    if (rows >= 32 * threads && w.panels() * w.panel_bytes() <= (1 << 20)) {
        const int64_t tiles = (rows + 31) / 32, start = tiles * thread / threads * 32;
        product_block(w, scratch, start, std::min(rows, tiles * (thread + 1) / threads * 32), 0, w.panels(), out);
    } else {
        const int64_t start = w.panels() * thread / threads, end = w.panels() * (thread + 1) / threads;
        const int64_t some = std::max<int64_t>(1, (1 << 20) / w.panel_bytes());  // panels that stay in the cache
        for (int64_t p = start; p < end; p += some) product_block(w, scratch, 0, rows, p, std::min(end, p + some), out);
    }
}

#endif
