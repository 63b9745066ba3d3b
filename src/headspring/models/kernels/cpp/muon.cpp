// A step of Muon on matrices of one shape: momentum, five or so Newton–Schulz iterations, update. A matrix stays in the cache
// of one processor core from its gradient to its new value, and the cores share out the matrices.

#include "tiles.h"

#ifdef HAS_PRODUCTS

namespace {

// x (m, n) bfloat16, m ≤ n ← the quintic iteration x ← a x + (b g + c g²) x with g = x xᵀ. Both g and g² are symmetric, to the
// last bit: only their blocks on and above the diagonal are multiplied. Right factors lie in panels of 32 columns.
class NewtonSchulz {
  public:
    NewtonSchulz(int64_t m, int64_t n)
        : m(m), n(n), panels(m * n / 2), gram_panels(m * m / 2), symmetric(m * m), gram(m * m), square(m * m), part(m * 32) {}

    void iterate(bf16 *x, float a, float b, float c) {
        for (int64_t p = 0; p < m; p += 32) pairs_of_transposed(x + p * n, n, 32, panels + p * n / 2, 32, 32, n);
        multiply_upper(x, n, panels, gram);
        fill_symmetric([&](int64_t i) { return read<floats>(gram + i); });
        for (int64_t p = 0; p < m; p += 32) pairs_of_rows(symmetric + p, m, m, gram_panels + p * m / 2, 32, m, 32);
        multiply_upper(symmetric, m, gram_panels, square);
        fill_symmetric([&](int64_t i) { return b * read<floats>(gram + i) + c * read<floats>(square + i); });
        for (int64_t p = 0; p < n; p += 32) {
            pairs_of_rows(x + p, n, m, panels, 32, m, 32);
            multiply(symmetric, m, panels, 32, part, 32, m, 32, m, false);
            for (int64_t r = 0; r < m; r++)
                for (int64_t i = 0; i < 32; i += 16) {
                    bf16 *at = x + r * n + p + i;
                    write_bf16(at, a * read_bf16(at) + read<floats>(part + r * 32 + i));
                }
        }
    }

  private:
    static constexpr int64_t STEP = 256;  // columns of one product: 16 KB of either factor, which stay in the first-level cache
    int64_t m, n;
    Buffer<uint32_t> panels, gram_panels;
    Buffer<bf16> symmetric;
    Buffer<float> gram, square, part;

    // The upper blocks of out (m, m) = left (m, inner) times the right factor in `right`.
    void multiply_upper(const bf16 *left, int64_t inner, const uint32_t *right, float *out) {
        for (int64_t k = 0; k < inner; k += STEP)
            for (int64_t r = 0; r < m; r += 32)
                for (int64_t p = r; p < m; p += 32)
                    multiply(left + r * inner + k, inner, right + p * inner / 2 + k * 16, 32, out + r * m + p, m, 32, 32,
                             k + STEP < inner ? STEP : inner - k, k > 0);
    }

    // symmetric ← the values at i = row · m + column of the upper blocks, rounded, and their mirror image.
    template <class Value>
    void fill_symmetric(Value value) {
        for (int64_t r = 0; r < m; r += 32)
            for (int64_t p = r; p < m; p += 32) {
                for (int64_t row = r; row < r + 32; row++)
                    for (int64_t i = row * m + p; i < row * m + p + 32; i += 16) write_bf16(symmetric + i, value(i));
                if (p > r) transposed(symmetric + r * m + p, m, 32, symmetric + p * m + r, m, 32, 32);
            }
    }
};

// The Nesterov direction with `momentum` (its sum kept up to date), divided by its norm, rounded.
void direction(const float *gradient, float *sum, float momentum, bf16 *out, int64_t count) {
    floats squares = {};
    for (int64_t i = 0; i < count; i += 16) {
        floats g = read<floats>(gradient + i), s = read<floats>(sum + i);
        s += (g - s) * (1.0f - momentum);
        write(sum + i, s);
        floats d = g + (s - g) * momentum;
        squares += d * d;
    }
    float scale = 1.0f / (std::sqrt(_mm512_reduce_add_ps((__m512)squares)) + 1e-7f);
    for (int64_t i = 0; i < count; i += 16) {
        floats g = read<floats>(gradient + i);
        write_bf16(out + i, (g + (read<floats>(sum + i) - g) * momentum) * scale);
    }
}

}  // namespace

// `matrices` are three addresses each: value, gradient, momentum, all (rows, columns) float32 in one piece, rows and columns
// multiples of 32. value ← keep · value − rate · direction.
extern "C" void muon(int threads, float *const (*matrices)[3], const float *coefficients, int64_t count, int64_t rows,
                     int64_t columns, int64_t steps, float momentum, float keep, float rate) {
    bool tall = rows > columns;
    int64_t m = tall ? columns : rows, n = tall ? rows : columns, size = rows * columns;
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        NewtonSchulz newton_schulz(m, n);
        Buffer<bf16> upright(size), wide(size);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; i++) {
            float *value = matrices[i][0];
            direction(matrices[i][1], matrices[i][2], momentum, upright, size);
            bf16 *x = upright;
            if (tall) transposed(upright, columns, rows, x = wide, rows, rows, columns);
            for (int64_t step = 0; step < steps; step++)
                newton_schulz.iterate(x, coefficients[0], coefficients[1], coefficients[2]);
            if (tall) transposed(wide, rows, columns, upright, columns, columns, rows);
            for (int64_t j = 0; j < size; j += 16)
                write(value + j, keep * read<floats>(value + j) - rate * read_bf16(upright + j));
        }
    }
}

#endif
