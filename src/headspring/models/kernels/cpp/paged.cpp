// The operators of paged attention: see paged.h.

#include "paged.h"

#ifdef HAS_PRODUCTS

// q and y (rows, heads, channels): only a row must lie in one piece.
extern "C" void paged_attention(int threads, const Ragged *step, const Pages *pages, const Rows *q, const Rows *y,
                                int64_t heads, int64_t window, float scale) {
    std::vector<Strip> work = strips(*step, heads, pages->heads);
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        static thread_local PagedAttention attention;
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < work.size(); i++)
            attention.compute(work[i], *step, *pages, *q, *y, heads, window, scale);
    }
}

extern "C" void write_pages(int threads, const Pages *pages, const Rows *k, const Rows *v, const int64_t *slots, int64_t rows) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t task = 0; task < pages->heads * rows; task++) {  // a head's rows together: they share cache lines
        int64_t head = task / rows, row = task % rows, at = head * pages->channels;
        write_page(*pages, slots[row], head, k->data + row * k->ld + at, v->data + row * v->ld + at);
    }
}

#endif
