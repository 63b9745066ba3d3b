// Products with packed weights as operators, and the packing of what is in rows. See product.h.

#include "product.h"

#include <omp.h>

#ifdef HAS_PACKED_PRODUCTS

// Few multiplications are not worth waking threads for.
static int threads_for(int threads, const Packed &w, int64_t rows) {
    return rows * w.outputs * w.inputs < 32768 ? 1 : threads;
}

template <class T>
static void packed_product(int threads, const Packed *w, const T *x, int64_t ld, int64_t rows, T *y, const T *bias) {
    threads = threads_for(threads, *w, rows);
    Scratch scratch(rows, w->inputs);
#pragma omp parallel num_threads(threads)
    {
        const int thread = omp_get_thread_num(), count = omp_get_num_threads();
        arrange(x, ld, rows, *w, scratch, thread, count);
#pragma omp barrier
        product(*w, scratch, y, w->outputs, rows, thread, count, (const T *)nullptr, bias);
    }
}

// y (rows, outputs) = x (rows, inputs), rows `ld` apart, times Wᵀ, plus `bias` (outputs,) unless null.
extern "C" void packed_product_bf16(int threads, const Packed *w, const bf16 *x, int64_t ld, int64_t rows, bf16 *y,
                                    const bf16 *bias) {
    packed_product(threads, w, x, ld, rows, y, bias);
}
extern "C" void packed_product_f32(int threads, const Packed *w, const float *x, int64_t ld, int64_t rows, float *y,
                                   const float *bias) {
    packed_product(threads, w, x, ld, rows, y, bias);
}

// in (rows, words) of 32 bits → panels (rows / 32 rounded up, words, 32) of in ^ change, rows that do not exist as zeros; with
// `halves` (…, words, 16): bytes of 4 bits after `change` was added, row n in the low half and n + 16 in the high one. `words`
// is a multiple of 16.
extern "C" void pack_words(int threads, const uint32_t *in, int64_t rows, int64_t words_a_row, uint32_t change, int64_t halves,
                           uint32_t *out) {
    const int64_t lanes = halves ? PANEL / 2 : PANEL;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < (rows + PANEL - 1) / PANEL; p++) {
        const __m512i changes = _mm512_set1_epi32(int32_t(change));
        words upper[16], lower[16];
        for (int64_t c = 0; c < words_a_row; c += 16) {
            const int64_t r = p * PANEL;
            turn_block((const bf16 *)(in + r * words_a_row + c), words_a_row * 2, rows - r, upper);
            turn_block((const bf16 *)(in + (r + 16) * words_a_row + c), words_a_row * 2, rows - r - 16, lower);
            uint32_t *to = out + (p * words_a_row + c) * lanes;
            for (int i = 0; i < 16; i++, to += lanes) {
                if (halves) {
                    const __m512i low = _mm512_add_epi8((__m512i)upper[i], changes);
                    const __m512i high = _mm512_add_epi8((__m512i)lower[i], changes);
                    write(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 4)));
                } else {
                    write(to, _mm512_xor_si512((__m512i)upper[i], changes));
                    write(to + 16, _mm512_xor_si512((__m512i)lower[i], changes));
                }
            }
        }
    }
}

#endif
