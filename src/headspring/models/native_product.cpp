// Products with packed weights as operators, and the packing of what is in rows. See native_product.h.

#include "native_product.h"

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

// in (rows, words) of 32 bits → panels (rows / 32 rounded up, words, 32), rows that do not exist as zeros. `words` is a
// multiple of 16.
extern "C" void pack_words(int threads, const uint32_t *in, int64_t rows, int64_t words, uint32_t *out) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r += PANEL)
        pairs_of_transposed((const bf16 *)(in + r * words), words * 2, rows - r, out + r * words, PANEL, PANEL, words * 2);
}

#endif
