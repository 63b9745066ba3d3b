// The fused element-wise operators of kernels/__init__.py, for float32 and bfloat16: read once, compute in float, write once. Plain
// loops where the compiler vectorises them well, else sixteen numbers at a time (vectors.h). Each exists as NAME_f32 and NAME_bf16.

// Plain loops that store say `omp simd`: without it the compiler makes two versions, for arrays that overlap and for those that do not,
// asks at run time how near they lie, and the two round differently. (An array may be its own source, element by element.)

#include "rows.h"
#include "vectors.h"

#include <sys/syscall.h>
#include <unistd.h>
#include <vector>

// Whether `multiply` exists here. A process must ask Linux for the tile registers once before it uses them.
extern "C" int prepare_products() {
#if defined(HAS_PRODUCTS) && defined(__AMX_BF16__)
    const long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#elif defined(HAS_PRODUCTS)
    return 1;
#else
    return 0;
#endif
}

template <class T>
float normalise(const T *in, const float *weight, T *out, int64_t width, float epsilon) {
    float sum = 0;
    for (int64_t i = 0; i < width; i++) sum += load(in[i]) * load(in[i]);
    float s = 1.0f / std::sqrt(sum / float(width) + epsilon);
#pragma omp simd
    for (int64_t i = 0; i < width; i++) store(out + i, load(in[i]) * s * weight[i]);
    return s;
}

template <class T>
static void rms_norm(int threads, const T *x, const float *weight, T *y, float *scale, int64_t rows, int64_t width,
                     float epsilon) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) scale[r] = normalise(x + r * width, weight, y + r * width, width, epsilon);
}

// With n = x s:  dx = s (w dy − n mean(w dy n)), plus `passed` where there is one;  dw = sum over rows of dy n, one partial
// sum a thread.
template <class T>
static void rms_norm_backward(int threads, const T *gradient, const T *passed, const T *x, const float *weight,
                              const float *scale, T *grad_x, float *partial, int64_t rows, int64_t width) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < threads; t++) {
        float *sums = partial + t * width;
        for (int64_t r = rows * t / threads; r < rows * (t + 1) / threads; r++) {
            const T *dy = gradient + r * width, *in = x + r * width, *more = passed ? passed + r * width : nullptr;
            T *dx = grad_x + r * width;
            float s = scale[r], dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t i = 0; i < width; i++) {
                float normalised = load(in[i]) * s, g = load(dy[i]);
                sums[i] += g * normalised;
                dot += g * weight[i] * normalised;
            }
            dot /= float(width);
            if (more)
#pragma omp simd
                for (int64_t i = 0; i < width; i++)
                    store(dx + i, s * (load(dy[i]) * weight[i] - load(in[i]) * s * dot) + load(more[i]));
            else
#pragma omp simd
                for (int64_t i = 0; i < width; i++)
                    store(dx + i, s * (load(dy[i]) * weight[i] - load(in[i]) * s * dot));
        }
    }
}

// sum = x + y and its norm, in one pass.
template <class T>
static void add_rms_norm(int threads, const T *x, const T *y, const float *weight, T *sum, T *normed, float *scale,
                         int64_t rows, int64_t width, float epsilon) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const T *a = x + r * width, *b = y + r * width;
        T *out = sum + r * width;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) store(out + i, load(a[i]) + load(b[i]));
        scale[r] = normalise(out, weight, normed + r * width, width, epsilon);
    }
}

static inline floats sigmoid(floats x) { return 1.0f / (1.0f + exp_of(-x)); }

template <class T>
void silu_multiply_row(const T *gate, const T *up, T *y, int64_t width) {
    for (int64_t i = 0; i < width; i += 16) {
        const int64_t count = width - i;
        const floats g = load16(gate + i, count);
        store16(y + i, g * sigmoid(g) * load16(up + i, count), count);
    }
}

// `gate` and `up` are (rows, width), each row `stride` elements after the one before.
template <class T>
static void silu_multiply(int threads, const T *gate, const T *up, T *y, int64_t rows, int64_t width, int64_t stride) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) silu_multiply_row(gate + r * stride, up + r * stride, y + r * width, width);
}

// With s = sigmoid(gate):  d up = dy gate s,  d gate = dy up s (1 + gate (1 − s)).
template <class T>
static void silu_multiply_backward(int threads, const T *gradient, const T *gate, const T *up, T *grad_gate, T *grad_up,
                                   int64_t rows, int64_t width, int64_t stride) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < width; i += 16) {
            const int64_t at = r * stride + i, count = width - i;
            const floats g = load16(gate + at, count), dy = load16(gradient + r * width + i, count), s = sigmoid(g);
            store16(grad_up + at, dy * g * s, count);
            store16(grad_gate + at, dy * load16(up + at, count) * s * (1.0f + g * (1.0f - s)), count);
        }
}

// g sigmoid(alpha g) (u + 1) with g at most `limit` and |u| at most `limit`: GPT-OSS's gate. Beyond a limit nothing flows back.
template <class T>
static void clamped_multiply(int threads, const T *gate, const T *up, T *y, int64_t rows, int64_t width, int64_t stride,
                             float alpha, float limit) {
    const floats most = floats{} + limit;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < width; i += 16) {
            const int64_t at = r * stride + i, count = width - i;
            floats g = load16(gate + at, count), u = load16(up + at, count);
            g = g > most ? most : g;
            u = u > most ? most : u < -most ? -most : u;
            store16(y + r * width + i, g * sigmoid(alpha * g) * (u + 1.0f), count);
        }
}

template <class T>
static void clamped_multiply_backward(int threads, const T *gradient, const T *gate, const T *up, T *grad_gate, T *grad_up,
                                      int64_t rows, int64_t width, int64_t stride, float alpha, float limit) {
    const floats most = floats{} + limit;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < width; i += 16) {
            const int64_t at = r * stride + i, count = width - i;
            const floats given = load16(gate + at, count), u = load16(up + at, count);
            const floats dy = load16(gradient + r * width + i, count), g = given > most ? most : given, s = sigmoid(alpha * g);
            const floats held = u > most ? most : u < -most ? -most : u;
            const floats to_gate = dy * (held + 1.0f) * s * (1.0f + alpha * g * (1.0f - s)), to_up = dy * g * s;
            store16(grad_gate + at, given > most ? floats{} : to_gate, count);
            store16(grad_up + at, (u > most) | (u < -most) ? floats{} : to_up, count);
        }
}

template <class T>
static void rotate(int threads, const T *x, const float *cosines, const float *sines, T *y, int64_t batch, int64_t time,
                   int64_t heads, int64_t channels, int64_t row_stride, int64_t inverse) {
    int64_t half = channels / 2;
    float sign = inverse ? -1.0f : 1.0f;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < batch * time; row++) {
        int64_t place = (row / time) * row_stride + row % time;
        const float *c = cosines + place * half, *s = sines + place * half;
        for (int64_t h = 0; h < heads; h++) {
            const T *in = x + (row * heads + h) * channels;
            T *out = y + (row * heads + h) * channels;
#pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                float a = load(in[i]), b = load(in[i + half]), si = sign * s[i];
                store(out + i, a * c[i] - b * si);
                store(out + i + half, b * c[i] + a * si);
            }
        }
    }
}

template <class T>
void place_row(const T *in, const float *gains, const float *cosines, const float *sines, T *out, int64_t heads,
               int64_t channels, float epsilon, float *room) {
    int64_t half = channels / 2;
    float *n = room;
    for (int64_t h = 0; h < heads; h++, in += channels, out += channels) {
        for (int64_t i = 0; i < channels; i++) n[i] = load(in[i]);
        if (gains) {
            float squares = 0;
            for (int64_t i = 0; i < channels; i++) squares += n[i] * n[i];
            float s = 1.0f / std::sqrt(squares / float(channels) + epsilon);
#pragma omp simd
            for (int64_t i = 0; i < channels; i++) n[i] *= s * gains[h * channels + i];
        }
        if (cosines)
#pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                store(out + i, n[i] * cosines[i] - n[i + half] * sines[i]);
                store(out + i + half, n[i + half] * cosines[i] + n[i] * sines[i]);
            }
        else
            for (int64_t i = 0; i < channels; i++) store(out + i, n[i]);
    }
}

// Queries and keys from the product that made them with the values: row r of `mixed` (rows, stride) holds `heads` heads of
// `channels`, which become (rows, heads, channels).
template <class T>
static void place_heads(int threads, const T *mixed, const float *gains, const float *cosines, const float *sines, T *y,
                        int64_t rows, int64_t time, int64_t heads, int64_t channels, int64_t stride, int64_t row_stride,
                        float epsilon) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> room(channels);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            int64_t place = ((row / time) * row_stride + row % time) * (channels / 2);
            place_row(mixed + row * stride, gains, cosines ? cosines + place : nullptr, sines ? sines + place : nullptr,
                      y + row * heads * channels, heads, channels, epsilon, room.data());
        }
    }
}

// g ← the gradient dy (channels) before the rotation by (channels / 2,) cosines and sines (null: there was none).
template <class T>
static inline void turn_back(const T *dy, const float *cosines, const float *sines, float *g, int64_t channels) {
    const int64_t half = cosines ? channels / 2 : 0;
    for (int64_t i = 0; i < half; i += 16) {
        const int64_t count = half - i;
        const floats a = load16(dy + i, count), b = load16(dy + half + i, count);
        const floats c = load16(cosines + i, count), s = load16(sines + i, count);
        store16(g + i, a * c + b * s, count);
        store16(g + half + i, b * c - a * s, count);
    }
    for (int64_t i = 2 * half; i < channels; i += 16) store16(g + i, load16(dy + i, channels - i), channels - i);
}

// dx ← the gradient of a head `in` from that of its norm, g; `sums` += that of the gains. As in `rms_norm_backward`.
template <class T>
static inline void normalise_backward(const T *in, const float *g, const float *gains, float *sums, T *dx, int64_t channels,
                                      float epsilon) {
    floats squares = {}, dots = {};
    for (int64_t i = 0; i < channels; i += 16) {
        const floats x = load16(in + i, channels - i);
        squares += x * x;
    }
    const float s = 1.0f / std::sqrt(sum_of(squares) / float(channels) + epsilon);
    for (int64_t i = 0; i < channels; i += 16) {
        const int64_t count = channels - i;
        const floats gn = load16(g + i, count) * load16(in + i, count) * s;
        store16(sums + i, load16(sums + i, count) + gn, count);
        dots += gn * load16(gains + i, count);
    }
    const float dot = sum_of(dots) * s / float(channels);
    for (int64_t i = 0; i < channels; i += 16) {
        const int64_t count = channels - i;
        const floats gw = load16(g + i, count) * load16(gains + i, count);
        store16(dx + i, s * (gw - load16(in + i, count) * dot), count);
    }
}

// Its gradient: those of queries and keys (rows, heads or shared, channels), and of the values, which come after the keys in
// a row and were left as they are → `grad_mixed` (rows, stride), and the gains' as a partial sum a thread.
template <class T>
static void place_heads_backward(int threads, const T *dq, const T *dk, const T *dv, const T *mixed, const float *gains,
                                 const float *cosines, const float *sines, T *grad_mixed, float *partial, int64_t rows,
                                 int64_t time, int64_t queries, int64_t shared, int64_t channels, int64_t stride,
                                 int64_t row_stride, float epsilon) {
    const int64_t half = channels / 2, heads = queries + shared, values = shared * channels;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < threads; t++) {
        std::vector<float> turned(channels);
        float *g = turned.data();
        for (int64_t row = rows * t / threads; row < rows * (t + 1) / threads; row++) {
            const int64_t place = ((row / time) * row_stride + row % time) * half;
            for (int64_t h = 0; h < heads; h++) {
                const T *dy = h < queries ? dq + (row * queries + h) * channels : dk + (row * shared + h - queries) * channels;
                const T *in = mixed + row * stride + h * channels;
                T *dx = grad_mixed + row * stride + h * channels;
                turn_back(dy, cosines ? cosines + place : nullptr, sines ? sines + place : nullptr, g, channels);
                if (gains)
                    normalise_backward(in, g, gains + h * channels, partial + (t * heads + h) * channels, dx, channels, epsilon);
                else
                    for (int64_t i = 0; i < channels; i += 16) store16(dx + i, load16(g + i, channels - i), channels - i);
            }
            std::memcpy(grad_mixed + row * stride + heads * channels, dv + row * values, values * sizeof(T));
        }
    }
}

// e[i] becomes exp(e[i] − largest); returns the sum. One function for all types of logits, and 16 sums in order: whoever has the
// same logits, in whatever precision, gets the same bits.
__attribute__((noinline)) static float exponentials(float *e, float largest, int64_t count) {
    floats sums = {};
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        const floats x = exp_of(read<floats>(e + i) - largest);
        write(e + i, x);
        sums += x;
    }
    const floats rest = exp_of(load16(e + i, count - i) - largest);
    store16(e + i, rest, count - i);
    float sum = sum_of(sums);
    for (int64_t lane = 0; lane < count - i; lane++) sum += rest[lane];
    return sum;
}

// e ← in as float; returns the largest.
template <class T>
static inline float widen(const T *in, float *e, int64_t count) {
    floats largest = floats{} - INFINITY;
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        const floats x = load16(in + i, 16);
        write(e + i, x);
        largest = x > largest ? x : largest;
    }
    float found = -INFINITY;
    for (int64_t lane = 0; lane < 16; lane++) found = largest[lane] > found ? largest[lane] : found;
    for (; i < count; i++) {
        e[i] = load(in[i]);
        found = e[i] > found ? e[i] : found;
    }
    return found;
}

// One row at a time, so that its 2V bytes stay in cache: maximum, sum of exponentials, then the gradient in place.
template <class T>
static void cross_entropy(int threads, T *logits, const int64_t *targets, float *losses, int64_t rows, int64_t vocab,
                          float scale) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> kept(vocab);
        float *e = kept.data();
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            T *row = logits + r * vocab;
            const int64_t target = targets[r];
            const float largest = widen(row, e, vocab), logit = e[target], sum = exponentials(e, largest, vocab);
            losses[r] = std::log(sum) + largest - logit;
            const float factor = scale / sum;
            for (int64_t i = 0; i < vocab; i += 16) store16(row + i, load16(e + i, vocab - i) * factor, vocab - i);
            store(row + target, e[target] * factor - scale);
        }
    }
}

#define ROWS(T)                                                                                                      \
    template float normalise(const T *, const float *, T *, int64_t, float);                                         \
    template void silu_multiply_row(const T *, const T *, T *, int64_t);                                             \
    template void place_row(const T *, const float *, const float *, const float *, T *, int64_t, int64_t, float, float *);
ROWS(float)
ROWS(bf16)

#define BOTH(NAME, PARAMETERS, ARGUMENTS)                                        \
    extern "C" void NAME##_f32 PARAMETERS(float) { NAME<float> ARGUMENTS; }      \
    extern "C" void NAME##_bf16 PARAMETERS(bf16) { NAME<bf16> ARGUMENTS; }

#define RMS_NORM(T)                                                                                                  \
    (int threads, const T *x, const float *w, T *y, float *scale, int64_t rows, int64_t width, float epsilon)
BOTH(rms_norm, RMS_NORM, (threads, x, w, y, scale, rows, width, epsilon))

#define RMS_NORM_BACKWARD(T)                                                                                         \
    (int threads, const T *dy, const T *passed, const T *x, const float *w, const float *scale, T *dx, float *dw,    \
     int64_t rows, int64_t width)
BOTH(rms_norm_backward, RMS_NORM_BACKWARD, (threads, dy, passed, x, w, scale, dx, dw, rows, width))

#define ADD_RMS_NORM(T)                                                                                              \
    (int threads, const T *x, const T *y, const float *w, T *sum, T *normed, float *scale, int64_t rows,             \
     int64_t width, float epsilon)
BOTH(add_rms_norm, ADD_RMS_NORM, (threads, x, y, w, sum, normed, scale, rows, width, epsilon))

#define SILU_MULTIPLY(T)                                                                                             \
    (int threads, const T *gate, const T *up, T *y, int64_t rows, int64_t width, int64_t stride)
BOTH(silu_multiply, SILU_MULTIPLY, (threads, gate, up, y, rows, width, stride))

#define SILU_MULTIPLY_BACKWARD(T)                                                                                    \
    (int threads, const T *dy, const T *gate, const T *up, T *dgate, T *dup, int64_t rows, int64_t width,            \
     int64_t stride)
BOTH(silu_multiply_backward, SILU_MULTIPLY_BACKWARD, (threads, dy, gate, up, dgate, dup, rows, width, stride))

#define CLAMPED_MULTIPLY(T)                                                                                          \
    (int threads, const T *gate, const T *up, T *y, int64_t rows, int64_t width, int64_t stride, float alpha, float limit)
BOTH(clamped_multiply, CLAMPED_MULTIPLY, (threads, gate, up, y, rows, width, stride, alpha, limit))

#define CLAMPED_MULTIPLY_BACKWARD(T)                                                                                 \
    (int threads, const T *dy, const T *gate, const T *up, T *dgate, T *dup, int64_t rows, int64_t width,            \
     int64_t stride, float alpha, float limit)
BOTH(clamped_multiply_backward, CLAMPED_MULTIPLY_BACKWARD,
     (threads, dy, gate, up, dgate, dup, rows, width, stride, alpha, limit))

#define PLACE_HEADS(T)                                                                                               \
    (int threads, const T *mixed, const float *gains, const float *c, const float *s, T *y, int64_t rows,            \
     int64_t time, int64_t heads, int64_t channels, int64_t stride, int64_t row_stride, float epsilon)
BOTH(place_heads, PLACE_HEADS,
     (threads, mixed, gains, c, s, y, rows, time, heads, channels, stride, row_stride, epsilon))

#define PLACE_HEADS_BACKWARD(T)                                                                                      \
    (int threads, const T *dq, const T *dk, const T *dv, const T *mixed, const float *gains, const float *c,         \
     const float *s, T *dmixed, float *dgains, int64_t rows, int64_t time, int64_t heads, int64_t shared,            \
     int64_t channels, int64_t stride, int64_t row_stride, float epsilon)
BOTH(place_heads_backward, PLACE_HEADS_BACKWARD,
     (threads, dq, dk, dv, mixed, gains, c, s, dmixed, dgains, rows, time, heads, shared, channels, stride, row_stride,
      epsilon))

#define ROTATE(T)                                                                                                    \
    (int threads, const T *x, const float *c, const float *s, T *y, int64_t batch, int64_t time, int64_t heads,      \
     int64_t channels, int64_t row_stride, int64_t inverse)
BOTH(rotate, ROTATE, (threads, x, c, s, y, batch, time, heads, channels, row_stride, inverse))

#define CROSS_ENTROPY(T)                                                                                             \
    (int threads, T *logits, const int64_t *targets, float *losses, int64_t rows, int64_t vocab, float scale)
BOTH(cross_entropy, CROSS_ENTROPY, (threads, logits, targets, losses, rows, vocab, scale))
