// Products of small bfloat16 matrices with float32 sums, and the layouts that they read.
//
// A processor with bfloat16 instructions multiplies pairs: a left matrix in rows, times a right matrix whose rows k and
// k + 1 lie interleaved, one pair in 32 bits ("pairs" below: element (k/2, n) holds (k, n) in its low half, (k + 1, n) in
// its high half). AMX works on tiles of 16 × 16, AVX-512 on rows of 16; both read the same layouts, so that what is built
// on `multiply` does not know which it runs on. All sizes are multiples of 32: callers pad with zeros.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <cstdlib>

struct bf16 {
    uint16_t bits;
};

typedef float floats __attribute__((vector_size(64)));      // 16 of them
typedef int32_t integers __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));

template <class V>
static inline V read(const void *from) {
    V value;
    std::memcpy(&value, from, sizeof(V));
    return value;
}
template <class V>
static inline void write(void *to, V value) {
    std::memcpy(to, &value, sizeof(V));
}

#if defined(__AVX512BW__) && defined(__AVX512BF16__)
#define HAS_PRODUCTS 1
#include <immintrin.h>

// Rounded to nearest even.
static inline void write_bf16(bf16 *to, floats x) { write(to, _mm512_cvtneps_pbh((__m512)x)); }
static inline words pairs(floats low, floats high) {
    const __m512i interleaved = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                                 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (words)_mm512_permutexvar_epi16(interleaved, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}
static inline floats read_bf16(const bf16 *from) {
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
}

// Memory that is released where its name ends.
template <class T>
struct Buffer {
    T *data;
    explicit Buffer(int64_t count) : data((T *)std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)) {}
    ~Buffer() { std::free(data); }
    Buffer(const Buffer &) = delete;
    operator T *() { return data; }
};

// 2^x, relative error below 3e-6. NaN stays NaN.
static inline floats exp2_of(floats x) {
    floats whole = (floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    floats f = x - whole;
    floats p = 1.33988744e-3f * f + 9.61843703e-3f;
    p = p * f + 5.55034794e-2f;
    p = p * f + 2.40226462e-1f;
    p = p * f + 6.93147182e-1f;
    p = p * f + 1.0f;
    return (floats)_mm512_scalef_ps((__m512)p, (__m512)whole);
}

// 16 rows of 16 32-bit elements, transposed.
static inline void transpose(const words *in, words *out) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32((__m512i)in[i], (__m512i)in[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32((__m512i)in[i], (__m512i)in[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        __m512i even = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88), odd = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
        __m512i later_even = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
        __m512i later_odd = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
        out[i] = (words)_mm512_shuffle_i32x4(even, later_even, 0x88);
        out[i + 4] = (words)_mm512_shuffle_i32x4(odd, later_odd, 0x88);
        out[i + 8] = (words)_mm512_shuffle_i32x4(even, later_even, 0xdd);
        out[i + 12] = (words)_mm512_shuffle_i32x4(odd, later_odd, 0xdd);
    }
}

// Layouts of a matrix (rows, columns) of which only the first `valid` rows exist; zeros stand for the rest. Rows and columns
// are multiples of 32, `ld` is the distance between rows, in elements.

// 16 rows of 32 elements, as 16 words each, transposed.
static inline void turn_block(const bf16 *in, int64_t ld, int64_t valid, words *turned) {
    words block[16];
    for (int i = 0; i < 16; i++) block[i] = i < valid ? read<words>(in + i * ld) : words{};
    transpose(block, turned);
}

// out (columns / 2, rows) pairs: the right matrix of a product with inᵀ.
static inline void pairs_of_transposed(const bf16 *in, int64_t ld_in, int64_t valid, uint32_t *out, int64_t ld_out,
                                       int64_t rows, int64_t columns) {
    words turned[16];
    for (int64_t r = 0; r < rows; r += 16)
        for (int64_t c = 0; c < columns; c += 32) {
            turn_block(in + r * ld_in + c, ld_in, valid - r, turned);
            for (int i = 0; i < 16; i++) write(out + (c / 2 + i) * ld_out + r, turned[i]);
        }
}

// out (columns, rows) bf16.
static inline void transposed(const bf16 *in, int64_t ld_in, int64_t valid, bf16 *out, int64_t ld_out, int64_t rows,
                              int64_t columns) {
    words turned[16];
    for (int64_t c = 0; c < columns; c += 32)
        for (int64_t r = 0; r < rows; r += 16) {
            turn_block(in + r * ld_in + c, ld_in, valid - r, turned);
            for (int i = 0; i < 16; i++) {
                bf16 *even = out + (c + 2 * i) * ld_out + r;
                _mm256_storeu_si256((__m256i *)even, _mm512_cvtepi32_epi16((__m512i)turned[i]));
                _mm256_storeu_si256((__m256i *)(even + ld_out), _mm512_cvtepi32_epi16((__m512i)(turned[i] >> 16)));
            }
        }
}

// out (rows / 2, columns) pairs: the right matrix of a product with in.
static inline void pairs_of_rows(const bf16 *in, int64_t ld_in, int64_t valid, uint32_t *out, int64_t ld_out, int64_t rows,
                                 int64_t columns) {
    for (int64_t r = 0; r < rows; r += 2)
        for (int64_t c = 0; c < columns; c += 16) {
            floats low = r < valid ? read_bf16(in + r * ld_in + c) : floats{};
            floats high = r + 1 < valid ? read_bf16(in + (r + 1) * ld_in + c) : floats{};
            write(out + r / 2 * ld_out + c, ((words)low >> 16) | (words)high);
        }
}

// in (columns, rows) float32 → out (rows, columns) bf16, times `factors` of each row.
static inline void transposed_to_bf16(const float *in, int64_t ld_in, bf16 *out, int64_t ld_out, int64_t rows,
                                      int64_t columns, const float *factors) {
    words block[16], turned[16];
    for (int64_t r = 0; r < rows; r += 16)
        for (int64_t c = 0; c < columns; c += 16) {
            for (int i = 0; i < 16; i++) block[i] = read<words>(in + (c + i) * ld_in + r);
            transpose(block, turned);
            for (int i = 0; i < 16; i++) write_bf16(out + (r + i) * ld_out + c, (floats)turned[i] * factors[r + i]);
        }
}

#ifdef __AMX_BF16__

// Holds the tile registers of this thread: eight tiles of 16 rows of 64 bytes.
struct Tiles {
    Tiles() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shape;
        _tile_loadconfig(&shape);
    }
    ~Tiles() { _tile_release(); }
};

// c (M, N) float32 = [c +] a (M, K) · b (K / 2, N) pairs. M, N, K multiples of 32.
static inline void multiply(const bf16 *a, int64_t lda, const uint32_t *b, int64_t ldb, float *c, int64_t ldc, int64_t M,
                            int64_t N, int64_t K, bool add) {
    for (int64_t m = 0; m < M; m += 32)
        for (int64_t n = 0; n < N; n += 32) {
            float *upper = c + m * ldc + n, *lower = upper + 16 * ldc;
            if (add) {
                _tile_loadd(0, upper, ldc * 4);
                _tile_loadd(1, upper + 16, ldc * 4);
                _tile_loadd(2, lower, ldc * 4);
                _tile_loadd(3, lower + 16, ldc * 4);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (int64_t k = 0; k < K; k += 32) {
                _tile_loadd(4, a + m * lda + k, lda * 2);
                _tile_loadd(6, b + k / 2 * ldb + n, ldb * 4);
                _tile_loadd(7, b + k / 2 * ldb + n + 16, ldb * 4);
                _tile_loadd(5, a + (m + 16) * lda + k, lda * 2);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, upper, ldc * 4);
            _tile_stored(1, upper + 16, ldc * 4);
            _tile_stored(2, lower, ldc * 4);
            _tile_stored(3, lower + 16, ldc * 4);
        }
}

#else

struct Tiles {};

static inline void multiply(const bf16 *a, int64_t lda, const uint32_t *b, int64_t ldb, float *c, int64_t ldc, int64_t M,
                            int64_t N, int64_t K, bool add) {
    constexpr int ROWS = 8;
    for (int64_t n = 0; n < N; n += 32)
        for (int64_t m = 0; m < M; m += ROWS) {
            __m512 left[ROWS], right[ROWS];
            for (int i = 0; i < ROWS; i++) {
                const float *at = c + (m + i) * ldc + n;
                left[i] = add ? _mm512_loadu_ps(at) : _mm512_setzero_ps();
                right[i] = add ? _mm512_loadu_ps(at + 16) : _mm512_setzero_ps();
            }
            for (int64_t k = 0; k < K; k += 2) {
                __m512bh b0 = (__m512bh)_mm512_loadu_si512(b + k / 2 * ldb + n);
                __m512bh b1 = (__m512bh)_mm512_loadu_si512(b + k / 2 * ldb + n + 16);
#pragma GCC unroll 8
                for (int i = 0; i < ROWS; i++) {
                    __m512bh pair = (__m512bh)_mm512_set1_epi32(read<int32_t>(a + (m + i) * lda + k));
                    left[i] = _mm512_dpbf16_ps(left[i], pair, b0);
                    right[i] = _mm512_dpbf16_ps(right[i], pair, b1);
                }
            }
            for (int i = 0; i < ROWS; i++) {
                _mm512_storeu_ps(c + (m + i) * ldc + n, left[i]);
                _mm512_storeu_ps(c + (m + i) * ldc + n + 16, right[i]);
            }
        }
}

#endif
#endif
