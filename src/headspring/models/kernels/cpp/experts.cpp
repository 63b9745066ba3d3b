// What a mixture of experts does beside its products: the router's logits, and the way of the experts' rows back to tokens.
// Each result is summed in one order, from its token's own numbers alone.

#include "numbers.h"

// y (rows, experts) = x (rows, width) · wᵀ + bias, in float32; x float32 or bfloat16, bias null or (experts,). Sixteen partial sums,
// element i in sum i mod 16, which are then added in order.
template <class T>
static void router_logits(int threads, const T *x, const float *w, const float *bias, float *y, int64_t rows, int64_t width,
                          int64_t experts) {
#pragma omp parallel for num_threads(rows *width *experts < 65536 ? 1 : threads) schedule(static)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t e = 0; e < experts; e++) {
            const T *in = x + r * width;
            const float *weights = w + e * width;
            float sums[16] = {};
            int64_t i = 0;
            for (; i + 16 <= width; i += 16)
                for (int lane = 0; lane < 16; lane++) sums[lane] += load(in[i + lane]) * weights[i + lane];
            for (int lane = 0; i < width; i++, lane++) sums[lane] += load(in[i]) * weights[i];
            float total = 0;
            for (int lane = 0; lane < 16; lane++) total += sums[lane];
            y[r * experts + e] = bias ? total + bias[e] : total;
        }
}
extern "C" void router_logits_f32(int threads, const float *x, const float *w, const float *bias, float *y, int64_t rows,
                                  int64_t width, int64_t experts) {
    router_logits(threads, x, w, bias, y, rows, width, experts);
}
extern "C" void router_logits_bf16(int threads, const bf16 *x, const float *w, const float *bias, float *y, int64_t rows,
                                   int64_t width, int64_t experts) {
    router_logits(threads, x, w, bias, y, rows, width, experts);
}

// y (tokens, width) = Σ over k of weights[n, k] · rows[place[n, k]], in order; a negative place counts nothing.
template <class T>
static void combine(int threads, const T *rows, const float *weights, const int64_t *place, T *y, int64_t tokens, int64_t top,
                    int64_t width) {
#pragma omp parallel for num_threads(tokens *top *width < 32768 ? 1 : threads) schedule(static)
    for (int64_t n = 0; n < tokens; n++)
        for (int64_t start = 0; start < width; start += 64) {
            const int64_t count = width - start < 64 ? width - start : 64;
            float sums[64] = {};
            for (int64_t k = 0; k < top; k++) {
                const int64_t row = place[n * top + k];
                if (row < 0) continue;
                const T *in = rows + row * width + start;
                const float weight = weights[n * top + k];
#pragma omp simd
                for (int64_t i = 0; i < count; i++) sums[i] += weight * load(in[i]);
            }
            T *out = y + n * width + start;
#pragma omp simd
            for (int64_t i = 0; i < count; i++) store(out + i, sums[i]);
        }
}
extern "C" void combine_f32(int threads, const float *rows, const float *weights, const int64_t *place, float *y, int64_t tokens,
                            int64_t top, int64_t width) {
    combine(threads, rows, weights, place, y, tokens, top, width);
}
extern "C" void combine_bf16(int threads, const bf16 *rows, const float *weights, const int64_t *place, bf16 *y, int64_t tokens,
                             int64_t top, int64_t width) {
    combine(threads, rows, weights, place, y, tokens, top, width);
}

// Gradients of `combine`: of its rows (those that no token has are left alone) and of its weights.
template <class T>
static void combine_backward(int threads, const T *gradient, const T *rows, const float *weights, const int64_t *place,
                             T *grad_rows, float *grad_weights, int64_t tokens, int64_t top, int64_t width) {
#pragma omp parallel for num_threads(tokens *top *width < 32768 ? 1 : threads) schedule(static)
    for (int64_t n = 0; n < tokens; n++)
        for (int64_t k = 0; k < top; k++) {
            const int64_t row = place[n * top + k];
            grad_weights[n * top + k] = 0;
            if (row < 0) continue;
            const T *dy = gradient + n * width, *in = rows + row * width;
            T *out = grad_rows + row * width;
            const float weight = weights[n * top + k];
            float dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t i = 0; i < width; i++) {
                dot += load(dy[i]) * load(in[i]);
                store(out + i, weight * load(dy[i]));
            }
            grad_weights[n * top + k] = dot;
        }
}
extern "C" void combine_backward_f32(int threads, const float *gradient, const float *rows, const float *weights,
                                     const int64_t *place, float *grad_rows, float *grad_weights, int64_t tokens, int64_t top,
                                     int64_t width) {
    combine_backward(threads, gradient, rows, weights, place, grad_rows, grad_weights, tokens, top, width);
}
extern "C" void combine_backward_bf16(int threads, const bf16 *gradient, const bf16 *rows, const float *weights,
                                      const int64_t *place, bf16 *grad_rows, float *grad_weights, int64_t tokens, int64_t top,
                                      int64_t width) {
    combine_backward(threads, gradient, rows, weights, place, grad_rows, grad_weights, tokens, top, width);
}
