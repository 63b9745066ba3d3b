// A step of Muon on matrices of one shape: momentum, five or so Newton–Schulz iterations, update. A matrix stays in the cache
// of one processor core from its gradient to its new value, and the cores share out the matrices.

#include "tiles.h"

#ifdef HAS_PRODUCTS

namespace {

// x (m, n) bfloat16, m ≤ n ← the quintic iteration x ← a x + (b g + c g²) x with g = x xᵀ.
class NewtonSchulz {
  public:
    NewtonSchulz(int64_t m, int64_t n)
        : m(m), n(n), right(m * n / 2), gram_right(m * m / 2), gram_rows(m * m), product(m * n), gram(m * m), square(m * m) {}

    void iterate(bf16 *x, float a, float b, float c) {
        pairs_of_transposed(x, n, m, right, m, m, n);
        multiply(x, n, right, m, gram, m, m, m, n, false);
        for (int64_t i = 0; i < m * m; i += 16) write_bf16(gram_rows + i, read<floats>(gram + i));
        pairs_of_rows(gram_rows, m, m, gram_right, m, m, m);
        multiply(gram_rows, m, gram_right, m, square, m, m, m, m, false);
        for (int64_t i = 0; i < m * m; i += 16)
            write_bf16(gram_rows + i, b * read<floats>(gram + i) + c * read<floats>(square + i));
        pairs_of_rows(x, n, m, right, n, m, n);
        multiply(gram_rows, m, right, n, product, n, m, n, m, false);
        for (int64_t i = 0; i < m * n; i += 16) write_bf16(x + i, a * read_bf16(x + i) + read<floats>(product + i));
    }

  private:
    int64_t m, n;
    Buffer<uint32_t> right, gram_right;
    Buffer<bf16> gram_rows;
    Buffer<float> product, gram, square;
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
