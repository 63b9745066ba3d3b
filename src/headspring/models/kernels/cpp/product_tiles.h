// Products with packed weights on AMX: tiles of 16 rows by 16 outputs. Part of product.h, which says what is computed.
//
// Blocks of 32 rows by one panel of 32 outputs: tiles 0–3 hold sums, 4 and 5 rows of x, 6 and 7 weights. The last rows take
// tiles with fewer rows, so that nothing is read or written beside x and y; a row's own arithmetic is the same.

#pragma once

// The tile registers for blocks of `upper` + `lower` rows; `depth` lines (of 32 bits) of weights in a tile.
struct TileShape {
    TileShape(int64_t upper, int64_t lower, int64_t depth) {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } shape;
        auto set = [&](int tile, int64_t rows, int64_t bytes) {
            shape.rows[tile] = uint8_t(rows);
            shape.row_bytes[tile] = uint16_t(rows ? bytes : 0);
        };
        set(0, upper, 64);
        set(1, upper, 64);
        set(2, lower, 64);
        set(3, lower, 64);
        set(4, upper, depth * 4);
        set(5, lower, depth * 4);
        set(6, depth, 64);
        set(7, depth, 64);
        _tile_loadconfig(&shape);
    }
    ~TileShape() { _tile_release(); }
};

// TWO: rows from 16 on exist.
template <bool TWO>
static inline void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    if (TWO) {
        _tile_zero(2);
        _tile_zero(3);
    }
}
template <bool TWO>
static inline void load_tiles(const uint8_t *x, int64_t ld, const uint8_t *weights) {
    _tile_loadd(4, x, ld);
    _tile_loadd(6, weights, 128);
    _tile_loadd(7, weights + 64, 128);
    if (TWO) _tile_loadd(5, x + 16 * ld, ld);
}
template <bool TWO>
static inline void store_sums(void *sums) {  // (32, 32)
    uint8_t *to = (uint8_t *)sums;
    _tile_stored(0, to, 128);
    _tile_stored(1, to + 64, 128);
    if (TWO) {
        _tile_stored(2, to + 16 * 128, 128);
        _tile_stored(3, to + 16 * 128 + 64, 128);
    }
}

// Panels from `panel`, for up to 32 rows from `row`. Sums of one panel are written out while the next one is multiplied.
template <bool TWO, class T>
static inline void pair_strip(const Packed &w, const Scratch &scratch, int64_t row, int64_t rows, int64_t panel,
                              int64_t last_panel, const Output<T> &out) {
    const bool cold = row == 0;  // the weights come from memory: ask for them in time
    alignas(64) float sums[2][32 * PANEL];
    const int64_t lines = w.padded() / 2, ld = scratch.ld * 2, share = (rows * 16 + lines - 1) / lines;
    const uint8_t *x = (const uint8_t *)(scratch.x + row * scratch.ld), *weights = w.panel(panel);
    for (int64_t p = panel; p <= last_panel; p++) {
        float *now = sums[p & 1], *before = sums[~p & 1];
        int64_t written = p == panel ? rows : 0;
        auto write_to = [&](int64_t end) {
            for (end = std::min(end, rows); written < end; written++) out.put_panel(row + written, p - 1, before + written * PANEL);
        };
        if (p < last_panel) {
            zero_sums<TWO>();
            for (int64_t line = 0; line < lines; line += 16, weights += 2048) {
                for (int64_t i = 0; cold && i < 2048; i += 64) _mm_prefetch((const char *)weights + 8192 + i, _MM_HINT_T0);
                load_tiles<TWO>(x + line * 4, ld, weights);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                if (TWO) {
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                }
                write_to(written + share);
            }
            store_sums<TWO>(now);
        }
        write_to(rows);
    }
}

// Sums of one block of integers: `lines` lines of a panel from `weights`, `depth` at a time.
template <bool TWO>
static inline void integer_sums(const uint8_t *x, int64_t ld, const uint8_t *weights, int64_t lines, int64_t depth, void *sums) {
    zero_sums<TWO>();
    for (int64_t line = 0; line < lines; line += depth) {
        load_tiles<TWO>(x + line * 4, ld, weights + line * 128);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        if (TWO) {
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
    }
    store_sums<TWO>(sums);
}

// `weights`: the panel as it is.
template <bool TWO, class T>
static inline void channel_block(const Packed &w, const Scratch &scratch, const uint8_t *weights, int64_t row, int64_t rows,
                                 int64_t p, const Output<T> &out) {
    alignas(64) int32_t sums[32 * PANEL];
    integer_sums<TWO>((const uint8_t *)scratch.bytes() + row * scratch.ld, scratch.ld, weights, w.padded() / 4, 16, sums);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t half = 0; half < 2; half++) {
            const __m512i start = _mm512_set1_epi32(scratch.starts()[row + r]);
            const __m512i sum = _mm512_add_epi32(_mm512_load_si512(sums + r * PANEL + half * 16), start);
            const int64_t n = p * PANEL + half * 16;
            out.put(row + r, n, scaled(sum, row + r, n, w, scratch));
        }
}

// `weights`: the panel as signed bytes. Tiles multiply groups while the sums of the two before are turned into floats, which
// takes longer than the products.
template <bool TWO, class T>
static inline void group_block(const Packed &w, const Scratch &scratch, const uint8_t *weights, int64_t row, int64_t rows,
                               int64_t p, const Output<T> &out) {
    alignas(64) int32_t sums[4][32 * PANEL];
    alignas(64) float totals[32 * PANEL] = {};
    const int64_t groups = w.groups(), lines = w.padded() / 4 / groups, depth = std::min<int64_t>(lines, 16);
    const uint8_t *x = (const uint8_t *)scratch.bytes() + row * scratch.ld;
    auto multiply = [&](int64_t g) {
        if (g >= groups) return;
        zero_sums<TWO>();
        for (int64_t line = g * lines; line < (g + 1) * lines; line += depth) {
            load_tiles<TWO>(x + line * 4, scratch.ld, weights + line * 128);
            _tile_dpbssd(0, 4, 6);
            _tile_dpbssd(1, 4, 7);
            if (TWO) {
                _tile_dpbssd(2, 5, 6);
                _tile_dpbssd(3, 5, 7);
            }
        }
    };
    auto store = [&](int64_t g) {
        if (g < groups) store_sums<TWO>(sums[g & 3]);
    };
    const float *row_scales = scratch.scales() + row * groups, *row_sums = scratch.sums() + row * groups;
    const float *scales = w.scales + p * groups * PANEL, *minimums = w.minimums ? w.minimums + p * groups * PANEL : nullptr;
    auto add = [&](int64_t g, int64_t first, int64_t last) {
        if (g >= groups) return;
        for (int64_t half = 0; half < 32; half += 16) {
            const int32_t *sum = sums[g & 3] + half;
            const floats scale = read<floats>(scales + g * PANEL + half);
            const floats minimum = minimums ? read<floats>(minimums + g * PANEL + half) : floats{};
            for (int64_t r = first; r < last; r++) {
                float *total = totals + r * PANEL + half;
                write(total, with_group(read<floats>(total), _mm512_load_si512(sum + r * PANEL), row_scales[r * groups + g],
                                        row_sums[r * groups + g], (const float *)&scale, minimums ? (const float *)&minimum : nullptr));
            }
        }
    };
    multiply(0), store(0), multiply(1), store(1);
    for (int64_t g = 0; g < groups; g += 2)
        for (int64_t part = 0; part < 4; part++) {
            part & 1 ? store(g + 2 + part / 2) : multiply(g + 2 + part / 2);
            add(g + part / 2, part % 2 * 16, std::min<int64_t>(rows, part % 2 * 16 + 16));
        }
    for (int64_t r = 0; r < rows; r++) out.put_panel(row + r, p, totals + r * PANEL);
}

template <class T>
static inline void integer_block(const Packed &w, const Scratch &scratch, const uint8_t *weights, int64_t row, int64_t rows,
                                 int64_t p, const Output<T> &out) {
    if (w.kind == INT8)
        rows > 16 ? channel_block<true>(w, scratch, weights, row, rows, p, out)
                  : channel_block<false>(w, scratch, weights, row, rows, p, out);
    else
        rows > 16 ? group_block<true>(w, scratch, weights, row, rows, p, out)
                  : group_block<false>(w, scratch, weights, row, rows, p, out);
}

// A panel of weights as signed bytes.
template <int BITS>
static inline void unpack_panel(const Packed &w, const uint8_t *panel, uint8_t *bytes) {
    const __m512i offset = _mm512_set1_epi8((char)w.offset);
    for (int64_t line = 0; line < w.padded() / 4; line++) {
        __m512i low, high;
        weights_of<BITS>(panel, line, low, high);
        _mm_prefetch((const char *)panel + line * BITS * 16 + 4096, _MM_HINT_T0);
        if (BITS == 8) _mm_prefetch((const char *)panel + line * 128 + 4160, _MM_HINT_T0);
        _mm512_storeu_si512(bytes + line * 128, _mm512_sub_epi8(low, offset));
        _mm512_storeu_si512(bytes + line * 128 + 64, _mm512_sub_epi8(high, offset));
    }
}

// Up to 32 rows from `row` and some panels, which are read as they are.
template <class T>
static inline void strip(const Packed &w, const Scratch &scratch, int64_t row, int64_t rows, int64_t panel,
                         int64_t last_panel, const Output<T> &out) {
    if (w.kind == BF16) {
        rows > 16 ? pair_strip<true>(w, scratch, row, rows, panel, last_panel, out)
                  : pair_strip<false>(w, scratch, row, rows, panel, last_panel, out);
        return;
    }
    for (int64_t p = panel; p < last_panel; p++)
        integer_block(w, scratch, w.panel(p), row, rows, p, out);
}

// All rows of some panels of groups, each unpacked once.
template <class T>
static inline void unpacked_panels(const Packed &w, const Scratch &scratch, int64_t row, int64_t end, int64_t panel,
                                   int64_t last_panel, const Output<T> &out, uint8_t *bytes) {
    for (int64_t p = panel; p < last_panel; p++) {
        w.bits == 8 ? unpack_panel<8>(w, w.panel(p), bytes) : unpack_panel<4>(w, w.panel(p), bytes);
        for (int64_t r = row; r < end; r += 32)
            integer_block(w, scratch, bytes, r, std::min<int64_t>(32, end - r), p, out);
    }
}

// Rows and panels that one thread computes.
template <class T>
static inline void product_block(const Packed &w, const Scratch &scratch, int64_t row, int64_t end, int64_t panel,
                                 int64_t last_panel, const Output<T> &out) {
    const int64_t few = w.kind == GROUPS ? 8 : 4;  // rows for which dot products are as fast as tiles
    if (w.kind != BF16 && end - row <= few) {
        for (int64_t p = panel; p < last_panel; p++)
            w.bits == 8 ? integer_rows<8>(w, scratch, row, end, p, out) : integer_rows<4>(w, scratch, row, end, p, out);
        return;
    }
    const int64_t depth = w.kind == GROUPS ? std::min<int64_t>(w.group / 4, 16) : 16, whole = row + (end - row) / 32 * 32;
    const int64_t rest = end - whole;
    Buffer<uint8_t> bytes(w.kind == GROUPS ? w.padded() * PANEL : 0);
    auto run = [&](int64_t from, int64_t to) {
        if (w.kind == GROUPS) return unpacked_panels(w, scratch, from, to, panel, last_panel, out, bytes.data);
        for (int64_t r = from; r < to; r += 32) strip(w, scratch, r, std::min<int64_t>(32, to - r), panel, last_panel, out);
    };
    if (row < whole) {
        TileShape shape(16, 16, depth);
        run(row, whole);
    }
    if (rest) {
        TileShape shape(std::min<int64_t>(rest, 16), std::max<int64_t>(rest - 16, 0), depth);
        run(whole, end);
    }
}
