// The gradient of a weight matrix: gᵀ x, with float32 sums that are never rounded to bfloat16 on the way.
//
// General libraries do this product at a third of their usual speed, because both factors stand the wrong way round. Here
// each chunk of rows is brought into the layouts of `multiply` once and used while it is in the cache.

#include "tiles.h"

#ifdef HAS_PRODUCTS

namespace {
constexpr int64_t ROWS = 256, LD = ROWS + 32;  // a chunk of both factors stays in a second-level cache
}

// out (outputs, inputs) float32 = gᵀ x, with g (rows, outputs) and x (rows, inputs) bfloat16, whose rows are `ld_g` and `ld_x`
// elements apart. Outputs and inputs are multiples of 32.
extern "C" void weight_gradient(int threads, const bf16 *g, const bf16 *x, float *out, int64_t ld_g, int64_t ld_x,
                                int64_t rows, int64_t outputs, int64_t inputs, int64_t add) {
    Buffer<uint32_t> right(ROWS / 2 * inputs);
    Buffer<bf16> left(outputs * LD);
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        for (int64_t start = 0; start < rows; start += ROWS) {
            int64_t valid = rows - start < ROWS ? rows - start : ROWS, whole = (valid + 31) / 32 * 32;
#pragma omp for schedule(static)
            for (int64_t r = 0; r < whole; r += 32) {
                transposed(g + (start + r) * ld_g, ld_g, valid - r, left + r, LD, 32, outputs);
                for (int64_t i = 0; i < inputs; i += 32)  // panels of 32 columns, each of them contiguous
                    pairs_of_rows(x + (start + r) * ld_x + i, ld_x, valid - r, right + (i * ROWS + r * 32) / 2, 32, 32, 32);
            }
#pragma omp for schedule(static)
            for (int64_t o = 0; o < outputs; o += 32)
                for (int64_t i = 0; i < inputs; i += 32)
                    multiply(left + o * LD, LD, right + i * ROWS / 2, 32, out + o * inputs + i, inputs, 32, 32, whole,
                             add || start > 0);
        }
    }
}

#endif
