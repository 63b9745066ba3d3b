// Attention whose queries see a stretch of keys that ends at themselves, forward and backward, for bfloat16.
//
// Scores are made transposed, keys down and queries across: what belongs to a query (maximum, sum, mask) then lies in one
// lane of a vector, no sum runs across a vector, and one layout of each factor serves every product. A strip of scores
// lives in the cache and is never written to memory. The backward pass makes the scores again (arXiv 2205.14135).
//
// Query t of row b sees the keys first[b, t] … t; `first` does not decrease along a row. That is causal attention, within
// packed documents or a sliding window.

#include "softmax.h"

#ifdef HAS_PRODUCTS

#include <algorithm>
#include <type_traits>

constexpr float LOG2_E = 1.44269504089f;

// The keys begin … end − 1 in three stretches, of which only the outer two need a mask. Their borders are even, because two
// keys make a pair.
template <class Work>
static inline void for_stretches(int64_t begin, int64_t end, const Queries &queries, Work work) {
    int64_t open = std::min(end, std::max(begin, (queries.shared_begin + 1) / 2 * 2));
    int64_t close = std::max(open, std::min(end, queries.shared_end / 2 * 2));
    work(begin, open, std::true_type());
    work(open, close, std::false_type());
    work(close, end, std::true_type());
}

floats softmax(const float *scores, uint32_t *out, int64_t stride, int64_t begin, int64_t end, const Queries &queries,
               float scale, floats *log2_sums) {
    scores -= begin * stride, out -= begin / 2 * stride;
    floats largest[2] = {floats{} - INFINITY, floats{} - INFINITY}, sums[2] = {};  // of even and of odd keys
    for_stretches(begin, end, queries, [&](int64_t from, int64_t to, auto masked) {
        for (int64_t k = from; k < to; k += 2)
            for (int i = 0; i < 2; i++) {
                floats s = read<floats>(scores + (k + i) * stride);
                if (masked) s = queries.seen(s, k + i, -INFINITY);
                largest[i] = (floats)_mm512_max_ps((__m512)s, (__m512)largest[i]);
            }
    });
    floats factor = floats{} + scale * LOG2_E, offset = (floats)_mm512_max_ps((__m512)largest[0], (__m512)largest[1]) * factor;
    for_stretches(begin, end, queries, [&](int64_t from, int64_t to, auto masked) {
        for (int64_t k = from; k < to; k += 2) {
            floats p[2];
            for (int i = 0; i < 2; i++) {
                p[i] = exp2_of(read<floats>(scores + (k + i) * stride) * factor - offset);
                if (masked) p[i] = queries.seen(p[i], k + i, 0.0f);
                sums[i] += p[i];
            }
            write(out + k / 2 * stride, pairs(p[0], p[1]));
        }
    });
    floats sum = sums[0] + sums[1];
    if (log2_sums)
        for (int i = 0; i < 16; i++) (*log2_sums)[i] = std::log2(sum[i]) + offset[i];
    return 1.0f / sum;
}

namespace {

constexpr int64_t QUERIES = 32, KEYS = 64;

int64_t padded(int64_t count) { return (count + KEYS - 1) / KEYS * KEYS; }

// A tensor of bfloat16 (batch, heads, time, channels): the distances between batches, heads and rows, in elements.
struct View {
    bf16 *data;
    int64_t batch, head, time;
    bf16 *row(int64_t b, int64_t h, int64_t t) const { return data + b * batch + h * head + t * time; }
    View from(int64_t t) const { return {data + t * time, batch, head, time}; }
};

enum { Q, K, V, Y, GRADIENT, DQ, DK, DV };  // the order in which views are passed

struct Shape {
    int64_t batch, heads, kv_heads, time, channels, rows, ld;
    Shape(const int64_t *s)
        : batch(s[0]), heads(s[1]), kv_heads(s[2]), time(s[3]), channels(s[4]), rows(padded(s[3])), ld(rows + 32) {}
    Shape part(int64_t count) const {
        const int64_t sizes[] = {batch, heads, kv_heads, count, channels};
        return Shape(sizes);
    }
};

void copy_rows(const View &in, int64_t b, int64_t h, bf16 *out, const Shape &s) {
    for (int64_t t = 0; t < s.time; t++) std::memcpy(out + t * s.channels, in.row(b, h, t), s.channels * sizeof(bf16));
    std::memset(out + s.time * s.channels, 0, (s.rows - s.time) * s.channels * sizeof(bf16));
}

void fill_first(const int64_t *first, int32_t *out, const Shape &s) {
    for (int64_t t = 0; t < s.rows; t++) out[t] = t >= s.time ? int32_t(t) : first ? int32_t(first[t]) : 0;
}

Queries queries_at(int64_t t, const int32_t *starts) { return Queries(places(t), read<integers>(starts + t)); }

// Where the document that begins at `start` ends; documents of one token that follow each other count as one.
int64_t end_of_document(const int64_t *origin, int64_t start, int64_t time) {
    if (!origin) return time;
    auto single = [&](int64_t t) { return origin[t] == t && (t + 1 == time || origin[t + 1] == t + 1); };
    int64_t end = start + 1;
    while (end < time && (single(start) ? single(end) : origin[end] == origin[start])) end++;
    return end;
}

// One row's documents one after the other: blocks of keys are counted from the first token of each, so that a document gets the
// bits that it has alone, wherever it stands.
void forward(const View *rows, float *log2_sums, const int64_t *first, const int64_t *origin, const Shape &whole, float scale,
             int64_t task) {
    int64_t b = task / whole.kv_heads, shared = task % whole.kv_heads, group = whole.heads / whole.kv_heads, C = whole.channels;
    Buffer<bf16> keys(whole.rows * C), values(C * whole.ld), result(QUERIES * C);
    Buffer<uint32_t> queries(C / 2 * whole.ld), pattern(whole.rows / 2 * QUERIES);
    Buffer<float> scores(whole.rows * QUERIES), mixed(C * QUERIES), factors(QUERIES);
    Buffer<int32_t> starts(whole.rows);
    for (int64_t start = 0, end; start < whole.time; start = end) {
        end = end_of_document(origin ? origin + b * whole.time : nullptr, start, whole.time);
        Shape s = whole.part(end - start);
        View x[] = {rows[Q].from(start), rows[K].from(start), rows[V].from(start), rows[Y].from(start)};
        for (int64_t t = 0; t < s.rows; t++)
            starts[t] = t >= s.time ? int32_t(t) : first ? int32_t(first[b * whole.time + start + t] - start) : 0;
        transposed(x[V].row(b, shared, 0), x[V].time, s.time, values, s.ld, s.rows, C);
        copy_rows(x[K], b, shared, keys, s);
        for (int64_t h = shared * group; h < (shared + 1) * group; h++) {
            pairs_of_transposed(x[Q].row(b, h, 0), x[Q].time, s.time, queries, s.ld, s.rows, C);
            float *logs = log2_sums + (b * whole.heads + h) * whole.rows + start;
            for (int64_t t = 0; t < s.time; t += QUERIES) {
                int64_t begin = starts[t] / QUERIES * QUERIES, last = t + QUERIES;
                multiply(keys + begin * C, C, queries + t, s.ld, scores, QUERIES, last - begin, QUERIES, C, false);
                for (int64_t i = 0; i < QUERIES; i += 16) {
                    floats logs_of_sums;
                    write(factors + i, softmax(scores + i, pattern + i, QUERIES, begin, last, queries_at(t + i, starts), scale,
                                               &logs_of_sums));
                    int64_t count = std::min<int64_t>(16, s.time - t - i);
                    if (count > 0) std::memcpy(logs + t + i, &logs_of_sums, count * sizeof(float));
                }
                multiply(values + begin, s.ld, pattern, QUERIES, mixed, QUERIES, C, QUERIES, last - begin, false);
                transposed_to_bf16(mixed, QUERIES, result, C, QUERIES, C, factors);
                for (int64_t i = 0; i < QUERIES && t + i < s.time; i++)
                    std::memcpy(x[Y].row(b, h, t + i), result + i * C, C * sizeof(bf16));
            }
        }
    }
    for (int64_t h = shared * group; h < (shared + 1) * group; h++)
        std::memset(log2_sums + (b * whole.heads + h) * whole.rows + whole.time, 0, (whole.rows - whole.time) * sizeof(float));
}

// From scores and dL/dp of KEYS keys and 32 queries: p and dL/ds = p (dL/dp − delta), in rows and the latter in pairs too.
// The scale of dL/ds is left to whoever writes dq and dk.
void softmax_backward(const float *scores, const float *gradients, bf16 *p_rows, bf16 *ds_rows, int64_t ld,
                      uint32_t *ds_pairs, int64_t key, const Queries &queries, floats factor, floats log2_sums,
                      floats delta) {
    for (int64_t i = 0; i < KEYS; i += 2) {
        floats ds[2];
        for (int64_t j = i; j < i + 2; j++) {
            floats p = exp2_of(read<floats>(scores + j * QUERIES) * factor - log2_sums);
            p = queries.seen(p, key + j, 0.0f);
            ds[j - i] = p * (read<floats>(gradients + j * QUERIES) - delta);
            write_bf16(p_rows + j * ld, p);
            write_bf16(ds_rows + j * ld, ds[j - i]);
        }
        write(ds_pairs + i / 2 * QUERIES, pairs(ds[0], ds[1]));
    }
}

void write_rows(const float *in, const View &out, int64_t b, int64_t h, const Shape &s, float scale) {
    for (int64_t t = 0; t < s.time; t++)
        for (int64_t c = 0; c < s.channels; c += 16)
            write_bf16(out.row(b, h, t) + c, read<floats>(in + t * s.channels + c) * scale);
}

void backward(const View *x, const float *log2_sums, const int64_t *first, const Shape &s, float scale, int64_t task) {
    int64_t b = task / s.kv_heads, shared = task % s.kv_heads, group = s.heads / s.kv_heads, C = s.channels;
    Buffer<bf16> rows(s.rows * C), keys(s.rows * C), values(s.rows * C), keys_turned(C * s.ld);
    Buffer<bf16> p_rows(KEYS * s.ld), ds_rows(KEYS * s.ld);
    Buffer<uint32_t> queries(C / 2 * s.ld), upstream(C / 2 * s.ld), query_rows(s.rows / 2 * C), upstream_rows(s.rows / 2 * C);
    Buffer<uint32_t> ds_pairs(KEYS / 2 * QUERIES);
    Buffer<float> scores(KEYS * QUERIES), gradients(KEYS * QUERIES), dq_turned(C * s.ld);
    Buffer<float> dk_sum(s.rows * C), dv_sum(s.rows * C);
    Buffer<float> delta(s.rows), scales(s.rows);
    Buffer<int32_t> starts(s.rows);
    fill_first(first ? first + b * s.time : nullptr, starts, s);
    copy_rows(x[K], b, shared, keys, s);
    copy_rows(x[V], b, shared, values, s);
    transposed(keys, C, s.rows, keys_turned, s.ld, s.rows, C);
    std::memset(dk_sum, 0, s.rows * C * sizeof(float));
    std::memset(dv_sum, 0, s.rows * C * sizeof(float));
    for (int64_t t = 0; t < s.rows; t++) scales[t] = scale;
    for (int64_t h = shared * group; h < (shared + 1) * group; h++) {
        pairs_of_transposed(x[GRADIENT].row(b, h, 0), x[GRADIENT].time, s.time, upstream, s.ld, s.rows, C);
        pairs_of_rows(x[GRADIENT].row(b, h, 0), x[GRADIENT].time, s.time, upstream_rows, C, s.rows, C);
        for (int64_t t = 0; t < s.rows; t++) {
            floats sum = {};
            for (int64_t c = 0; c < C && t < s.time; c += 16)
                sum += read_bf16(x[GRADIENT].row(b, h, t) + c) * read_bf16(x[Y].row(b, h, t) + c);
            delta[t] = _mm512_reduce_add_ps((__m512)sum);
        }
        pairs_of_transposed(x[Q].row(b, h, 0), x[Q].time, s.time, queries, s.ld, s.rows, C);
        pairs_of_rows(x[Q].row(b, h, 0), x[Q].time, s.time, query_rows, C, s.rows, C);
        std::memset(dq_turned, 0, C * s.ld * sizeof(float));
        const float *logs = log2_sums + (b * s.heads + h) * s.rows;
        floats factor = floats{} + scale * LOG2_E;
        for (int64_t key = 0; key < s.rows; key += KEYS) {
            int64_t t = key;
            for (; t < s.time && starts[t] < key + KEYS; t += QUERIES) {
                multiply(keys + key * C, C, queries + t, s.ld, scores, QUERIES, KEYS, QUERIES, C, false);
                multiply(values + key * C, C, upstream + t, s.ld, gradients, QUERIES, KEYS, QUERIES, C, false);
                for (int64_t i = 0; i < QUERIES; i += 16)
                    softmax_backward(scores + i, gradients + i, p_rows + t - key + i, ds_rows + t - key + i, s.ld,
                                     ds_pairs + i, key, queries_at(t + i, starts), factor,
                                     read<floats>(logs + t + i), read<floats>(delta + t + i));
                multiply(keys_turned + key, s.ld, ds_pairs, QUERIES, dq_turned + t, s.ld, C, QUERIES, KEYS, true);
            }
            multiply(p_rows, s.ld, upstream_rows + key / 2 * C, C, dv_sum + key * C, C, KEYS, C, t - key, true);
            multiply(ds_rows, s.ld, query_rows + key / 2 * C, C, dk_sum + key * C, C, KEYS, C, t - key, true);
        }
        transposed_to_bf16(dq_turned, s.ld, rows, C, s.rows, C, scales);
        for (int64_t t = 0; t < s.time; t++) std::memcpy(x[DQ].row(b, h, t), rows + t * C, C * sizeof(bf16));
    }
    write_rows(dk_sum, x[DK], b, shared, s, scale);
    write_rows(dv_sum, x[DV], b, shared, s, 1.0f);
}

template <class Work>
void for_each_kv_head(int threads, const Shape &s, Work work) {
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < s.batch * s.kv_heads; task++) work(task);
    }
}

}  // namespace

// `sizes` are batch, heads, kv_heads, time, channels (a multiple of 32); `first` and `origin` (batch, time), where each token's
// stretch of keys and its document begin, may be null.
extern "C" void attention(int threads, const View *views, float *log2_sums, const int64_t *first, const int64_t *origin,
                          const int64_t *sizes, float scale) {
    Shape s(sizes);
    for_each_kv_head(threads, s, [&](int64_t task) { forward(views, log2_sums, first, origin, s, scale, task); });
}

extern "C" void attention_backward(int threads, const View *views, const float *log2_sums, const int64_t *first,
                                   const int64_t *sizes, float scale) {
    Shape s(sizes);
    for_each_kv_head(threads, s, [&](int64_t task) { backward(views, log2_sums, first, s, scale, task); });
}

#endif
