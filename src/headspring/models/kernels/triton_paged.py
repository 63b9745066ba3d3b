"""Attention over an engine's pages on a GPU, and writing to them, in Triton.

    tiles (≥ 16 rows: some queries × the heads that share a key head)  ×  key heads  ×  splits of 256 keys
        └─ for each page of the split:  s = q kᵀ · scale,  m = max,  l += Σ exp(s − m),  a += exp(s − m) v
    then, a row at a time: the splits' (m, l, a) are joined in order, and the sink enters the denominator

Decoding has one query a sequence and many keys, so that keys are divided over programs too (arXiv 2311.01282). A split holds
*as many keys whatever the batch*, counted from the sequence's first token, a page is a step of its loop, and every tile has as
many rows: a row's sums have one order, and its bits do not depend on chunks, neighbours or their number. A page that a row does
not see adds exact zeros. What this gives up: prompts are read in tiles as small as those of decoding (16 rows), and a short
sequence alone fills few of a GPU's processors; counting splits by what would fill them is faster there, and is what makes other
engines' bits depend on the batch.

Queries, keys and values are bfloat16, float16 or float32, pages also int8; sums are float32. Triton's interpreter
(`TRITON_INTERPRET=1`) runs the same text on a CPU, which is how the tests read it.
"""

from typing import Any

import torch
import triton
import triton.language as tl

SPLIT = 256  # keys of a split: eight pages
ROWS = 16  # of a tile at least: what a matrix unit takes
PAGE = 32  # as `ragged.PAGE`


@triton.jit(do_not_specialize=["table_stride", "splits"])
def attend_splits(
    queries, keys, values, key_scales, value_scales, tables, offsets, past, tiles,  # what is read
    tops, totals, answers,  # what is written: (N, H, splits), the same, and (N, H, splits, C), float32
    scale, softcap, query_stride, table_stride, splits,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, C: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr,
    QUERIES: tl.constexpr, SPLIT: tl.constexpr, PAGE: tl.constexpr, CAPPED: tl.constexpr, SCALED: tl.constexpr,
    WINDOW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of queries, one key head, one split of keys. C ≤ CHANNELS, H / K ≤ GROUP: the next powers of two."""
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, first = tl.load(tiles + 2 * tile), tl.load(tiles + 2 * tile + 1)
    begin, end = tl.load(offsets + sequence).to(tl.int32), tl.load(offsets + sequence + 1).to(tl.int32)
    before, count = tl.load(past + sequence).to(tl.int32), end - begin
    last = before + tl.minimum(first + QUERIES, count) - 1  # the position of the tile's last query
    start, stop = split * SPLIT, tl.minimum((split + 1) * SPLIT, last + 1)
    if WINDOW > 0:
        start = tl.maximum(start, tl.maximum(before + first - WINDOW + 1, 0) // PAGE * PAGE)
    if start >= stop:
        return
    row, channel, place = tl.arange(0, QUERIES * GROUP), tl.arange(0, CHANNELS), tl.arange(0, PAGE)
    query, head = first + row // GROUP, kv_head * (HEADS // KV_HEADS) + row % GROUP
    real = (query < count) & (row % GROUP < HEADS // KV_HEADS)
    position, exists = before + query, channel < C
    at_query = (begin + query).to(tl.int64) * query_stride + head * C
    q = tl.load(queries + at_query[:, None] + channel[None, :], mask=real[:, None] & exists[None, :], other=0.0)
    if WIDE:
        q = q.to(tl.float32)
    top = tl.full([QUERIES * GROUP], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES * GROUP], tl.float32)
    answer = tl.zeros([QUERIES * GROUP, CHANNELS], tl.float32)
    for at in range(start, stop, PAGE):
        held = tl.load(tables + sequence * table_stride + at // PAGE).to(tl.int64) * KV_HEADS + kv_head
        key = at + place
        written = key <= last  # what stands behind is anybody's, and 0 · NaN would be NaN
        inside = exists[:, None] & written[None, :]
        k = tl.load(keys + held * PAGE * C + place[None, :] * C + channel[:, None], mask=inside, other=0.0)  # (C, PAGE)
        v = tl.load(values + held * PAGE * C + channel[:, None] * PAGE + place[None, :], mask=inside, other=0.0)
        if SCALED:
            kind = queries.dtype.element_ty
            k = (k.to(tl.float32) * tl.load(key_scales + held * PAGE + place, mask=written, other=0.0)[None, :]).to(kind)
            v = (v.to(tl.float32) * tl.load(value_scales + held * PAGE + place, mask=written, other=0.0)[None, :]).to(kind)
        if WIDE:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if CAPPED:  # softcap · tanh(s / softcap)
            scores = softcap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * scores / softcap)))
        seen = key[None, :] <= position[:, None]
        if WINDOW > 0:
            seen = seen & (key[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        around = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
        weights, shrink = tl.exp(scores - around[:, None]), tl.exp(top - around)
        total = total * shrink + tl.sum(weights, 1)
        if not WIDE:
            weights = weights.to(v.dtype)
        answer = answer * shrink[:, None] + tl.dot(weights, tl.trans(v), input_precision="ieee")
        top = higher
    slot = ((begin + query).to(tl.int64) * HEADS + head) * splits + split
    tl.store(tops + slot, top, mask=real)
    tl.store(totals + slot, total, mask=real)
    tl.store(answers + slot[:, None] * C + channel[None, :], answer, mask=real[:, None] & exists[None, :])


@triton.jit(do_not_specialize=["splits"])
def join_splits(
    tops, totals, answers, positions, sinks, y, splits,
    HEADS: tl.constexpr, C: tl.constexpr, CHANNELS: tl.constexpr, SPLIT: tl.constexpr, WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
):  # fmt: skip
    """One row of one head: what its splits found, in order."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position, row, channel = tl.load(positions + token).to(tl.int32), token * HEADS + head, tl.arange(0, CHANNELS)
    exists, lowest = channel < C, position * 0
    if WINDOW > 0:
        lowest = tl.maximum(position - WINDOW + 1, 0) // SPLIT
    slot = row * splits + lowest
    top, total = tl.load(tops + slot), tl.load(totals + slot)
    answer = tl.load(answers + slot * C + channel, mask=exists, other=0.0)
    for split in range(lowest + 1, position // SPLIT + 1):
        slot = row * splits + split
        next_top = tl.load(tops + slot)
        higher = tl.maximum(top, next_top)
        shrink, grow = tl.exp(top - higher), tl.exp(next_top - higher)
        total = total * shrink + tl.load(totals + slot) * grow
        answer = answer * shrink + tl.load(answers + slot * C + channel, mask=exists, other=0.0) * grow
        top = higher
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        higher = tl.maximum(top, sink)
        shrink = tl.exp(top - higher)
        total, answer = total * shrink + tl.exp(sink - higher), answer * shrink
    tl.store(y + row * C + channel, (answer / total).to(y.dtype.element_ty), mask=exists)


@triton.jit
def write_rows(
    k, v, keys, values, key_scales, value_scales, slots, k_stride, v_stride,
    KV_HEADS: tl.constexpr, C: tl.constexpr, CHANNELS: tl.constexpr, PAGE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """The key and the value of one token's head to where its slot says."""
    token, head, channel = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, CHANNELS)
    slot, exists = tl.load(slots + token).to(tl.int64), channel < C
    held, place = slot // PAGE * KV_HEADS + head, slot % PAGE
    key = tl.load(k + token * k_stride + head * C + channel, mask=exists, other=0.0)
    value = tl.load(v + token * v_stride + head * C + channel, mask=exists, other=0.0)
    if SCALED:
        key, value = key.to(tl.float32), value.to(tl.float32)
        key_scale, value_scale = tl.max(tl.abs(key), 0) / 127, tl.max(tl.abs(value), 0) / 127
        tl.store(key_scales + held * PAGE + place, key_scale)
        tl.store(value_scales + held * PAGE + place, value_scale)
        # Adding 1.5 · 2²³ and taking it away again rounds to the nearest whole number, of a tie to the even one.
        key = (key / tl.maximum(key_scale, 1e-30) + 12582912.0 - 12582912.0).to(tl.int8)
        value = (value / tl.maximum(value_scale, 1e-30) + 12582912.0 - 12582912.0).to(tl.int8)
    tl.store(keys + (held * PAGE + place) * C + channel, key, mask=exists)
    tl.store(values + (held * C + channel) * PAGE + place, value, mask=exists)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Every launch goes through here: what records a step for a test stands in its place."""
    kernel[grid](*arguments, enable_fp_fusion=False, **constants)  # a · b + c is rounded twice, as its text says


def attend(
    q: torch.Tensor,
    pools: tuple[torch.Tensor, ...],
    tables: torch.Tensor,
    offsets: torch.Tensor,
    past: torch.Tensor,
    positions: torch.Tensor,
    tiles: torch.Tensor,
    longest: int,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(cap(q kᵀ · scale)) v of queries q (N, H, C), each over the keys of its own sequence up to itself (the last
    `window` of them) → (N, H, C).

    `pools` are keys (P, K, PAGE, C) and values (P, K, C, PAGE), and their scales (P, K, PAGE) where they are int8; `tables`
    (S, pages) int32, `offsets` (S + 1,), `past` (S,), `positions` (N,) int64 as in `Ragged`; `tiles` from `Ragged.tiles`; no
    sequence has more than `longest` tokens, those of the step included. `sinks` (H,) are logits."""
    if q.stride(2) != 1 or q.stride(1) != q.shape[2]:
        q = q.contiguous()
    (tokens, heads, channels), kv_heads, splits = q.shape, pools[0].shape[1], -(-longest // SPLIT)
    group = triton.next_power_of_2(heads // kv_heads)
    found = [torch.empty(tokens, heads, splits, *size, dtype=torch.float32, device=q.device) for size in ((), (), (channels,))]
    keys, values, *scales = pools
    padded = max(16, triton.next_power_of_2(channels))
    shape: dict[str, Any] = {"HEADS": heads, "C": channels, "CHANNELS": padded, "SPLIT": SPLIT, "WINDOW": window or 0}
    launch(
        attend_splits, (len(tiles), kv_heads, splits),
        q, keys, values, *(scales or (keys, values)), tables, offsets, past, tiles, *found,
        scale, softcap or 1.0, q.stride(0), tables.stride(0), splits,
        KV_HEADS=kv_heads, GROUP=group, QUERIES=queries_of_a_tile(heads, kv_heads), PAGE=PAGE, CAPPED=softcap is not None,
        SCALED=bool(scales), WIDE=q.dtype == torch.float32 or q.device.type == "cpu", num_warps=4, **shape,
    )  # fmt: skip
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    launch(
        join_splits, (tokens, heads),
        *found, positions, y if sinks is None else sinks, y, splits, SINKS=sinks is not None, num_warps=1, **shape,
    )  # fmt: skip
    return y


def write(k: torch.Tensor, v: torch.Tensor, pools: tuple[torch.Tensor, ...], slots: torch.Tensor) -> None:
    """Store keys and values (N, K, C) at `slots` (N,) int64 = page · PAGE + place; int8 pools are given their scales too."""
    k, v = (x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous() for x in (k, v))
    (tokens, kv_heads, channels), (keys, values, *scales) = k.shape, pools
    launch(
        write_rows, (tokens, kv_heads),
        k, v, keys, values, *(scales or (keys, values)), slots, k.stride(0), v.stride(0),
        KV_HEADS=kv_heads, C=channels, CHANNELS=triton.next_power_of_2(channels), PAGE=PAGE, SCALED=bool(scales), num_warps=1,
    )  # fmt: skip


def queries_of_a_tile(heads: int, kv_heads: int) -> int:
    """How many queries, with all heads that share a key head, stand in one tile."""
    return max(1, ROWS // triton.next_power_of_2(heads // kv_heads))
