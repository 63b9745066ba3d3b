"""Recurrences whose memory is a matrix, in chunks: as attention inside a chunk, as a recurrence between chunks.

    decayed    S_t = α_t S_{t−1} + k_t v_tᵀ                               y_t = S_tᵀ q_t
    delta      S_t = α_t S_{t−1} + k_t β_t (v_t − α_t S_{t−1}ᵀ k_t)ᵀ      y_t = S_tᵀ q_t

`decayed` is Mamba-2 (the SSD algorithm, arXiv 2405.21060: q = C, k = B, v = Δx), linear attention (α = 1, arXiv 2006.16236)
and FAVOR+. `delta` is the gated delta rule (arXiv 2412.06464): what the memory already holds under k is taken away first.

Why chunks: token by token, T products of a vector and a matrix wait for each other; all at once, a pattern of T × T costs what
attention costs. With chunks of L tokens nearly all the work is matrix products of size L, and T / L steps wait.

Decays are scalars for a head, so that their products over a chunk are differences of cumulative logarithms, never quotients
of small numbers. Where memory starts anew (`starts`) the sums begin again and what lies across is cut, not multiplied by a
small number: a document's result does not depend on its neighbours by a single bit. What it gives up: the exponential of a
difference of sums over L tokens has an error of about L · 1e-7 of the log-decay, which is one reason that chunks are short.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from headspring.models.kernels import installed
from headspring.models.part import Cost
from headspring.models.scan import linear_scan

CHUNK = 64


def decayed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None,
    initial: torch.Tensor,
    starts: torch.Tensor | None = None,
    chunk: int = CHUNK,
    activations: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (B, T, H, P) and the last S (B, H, N, P).

    q, k (B, T, G, N) are shared by H / G heads each; v (B, T, H, P); log_decay (B, T, H) at most 0, None for no decay; initial
    (B, H, N, P); `starts` (B, T) bool, True where memory starts anew. All of one float dtype. For `activations` of half
    precision a fused kernel may stand in.
    """
    batch, time, heads, _ = v.shape
    if time == 1:
        return _decayed_step(q, k, v, log_decay, initial, starts)
    if installed.applies(v, activations, starts) and log_decay is not None:
        made = installed.decayed(q, k, v, log_decay, initial, activations)
        if made is not None:
            return made
    groups = q.shape[2]
    split = lambda s: s.unflatten(-3, (groups, heads // groups))  # heads of (…, H, N, P) by group
    parts = Chunks.of(time, chunk, batch, heads, log_decay, starts, v)
    q, k = (parts.cut(x).transpose(2, 3) for x in (q, k))  # (B, c, G, L, N)
    values = parts.cut(v).unflatten(3, (groups, -1))  # (B, c, L, G, R, P)
    v_inside = values.permute(0, 1, 3, 4, 2, 5)  # (B, c, G, R, L, P)
    scores = (q @ k.mT).unsqueeze(3)
    pattern = scores * parts.pairs.unflatten(2, (groups, -1))  # (B, c, G, R, L, L)
    y = pattern @ v_inside
    # What a chunk adds to the memory, and the memory that each chunk finds.
    kept = (values * parts.to_end.unflatten(2, (groups, -1)).permute(0, 1, 4, 2, 3)[..., None]).transpose(2, 3)
    added = (k.mT @ kept.flatten(4)).unflatten(-1, kept.shape[4:])  # (B, c, G, N, R, P)
    start = split(initial).transpose(2, 3)
    whole = parts.whole.unflatten(2, (groups, -1))[:, :, :, None, :, None]
    after = linear_scan(whole, added, start)
    found = torch.cat([start.unsqueeze(1), after[:, :-1]], dim=1)
    carried = (q @ found.flatten(4)).unflatten(-1, found.shape[4:]).permute(0, 1, 2, 4, 3, 5)  # (B, c, G, R, L, P)
    y = y + carried * parts.from_start.unflatten(2, (groups, -1))[..., None]
    y = y.permute(0, 1, 4, 2, 3, 5).reshape(batch, -1, heads, v.shape[-1])[:, :time]
    return y, after[:, -1].transpose(2, 3).flatten(1, 2)


def _decayed_step(q, k, v, log_decay, state, starts):
    """One token: the definition itself."""
    repeat = v.shape[2] // q.shape[2]
    q, k = (x[:, 0].repeat_interleave(repeat, dim=1) for x in (q, k))
    state = _fade(state, log_decay, starts) + k.unsqueeze(-1) * v[:, 0].unsqueeze(-2)
    return (q.unsqueeze(-2) @ state).transpose(1, 2), state


def _fade(state: torch.Tensor, log_decay: torch.Tensor | None, starts: torch.Tensor | None) -> torch.Tensor:
    """α S for one token."""
    if log_decay is not None:
        state = state * log_decay[:, 0, :, None, None].exp()
    return state if starts is None else state.masked_fill(starts[:, 0, None, None, None], 0.0)


def delta(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    initial: torch.Tensor,
    starts: torch.Tensor | None = None,
    chunk: int = CHUNK,
    activations: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (B, T, H, P) and the last S (B, H, N, P). q, k (B, T, H, N), k of length at most 1; v (B, T, H, P); log_decay, beta
    (B, T, H); the rest as in `decayed`.

    Inside a chunk the corrections u = β (v − α Sᵀk) depend on each other through a triangle (the WY form, arXiv 2406.06484):
    (I + A) U = β V − β e^c K S₀ with A_ij = β_i e^{c_i − c_j} k_i·k_j for j < i: one triangular solve gives all of them.
    """
    batch, time, heads, _ = v.shape
    if time == 1:
        held = _fade(initial, log_decay, starts)
        k, v, beta = k[:, 0], v[:, 0], beta[:, 0]
        u = beta.unsqueeze(-1) * (v - (k.unsqueeze(-2) @ held).squeeze(-2))
        state = held + k.unsqueeze(-1) * u.unsqueeze(-2)
        return (q[:, 0].unsqueeze(-2) @ state).transpose(1, 2), state
    if installed.applies(v, activations, starts):
        made = installed.delta(q, k, v, log_decay, beta, initial, activations)
        if made is not None:
            return made
    parts = Chunks.of(time, chunk, batch, heads, log_decay, starts, v)
    q, k, v = (parts.cut(x).transpose(2, 3) for x in (q, k, v))  # (B, c, H, L, N or P)
    beta = parts.cut(beta).transpose(2, 3).unsqueeze(-1)
    from_start = parts.from_start.unsqueeze(-1)
    triangle = (beta * (k @ k.mT) * parts.pairs).tril(-1)
    right = torch.cat([beta * v, beta * from_start * k], dim=-1)
    solved = torch.linalg.solve_triangular(triangle, right, upper=False, unitriangular=True)
    fresh, read = solved.split([v.shape[-1], k.shape[-1]], dim=-1)  # U = fresh − read S₀
    pattern, queries = (q @ k.mT) * parts.pairs, q * from_start
    keys, whole = (k * parts.to_end.unsqueeze(-1)).mT, parts.whole[..., None, None]
    state, outputs = initial, []
    # The gradient of x[:, i] would be as large as x, for each i: T² in all. That of `unbind` is x once.
    chunks = zip(*(x.unbind(1) for x in (fresh, read, pattern, queries, whole, keys)), strict=True)
    for fresh_i, read_i, pattern_i, queries_i, whole_i, keys_i in chunks:
        u = fresh_i - read_i @ state
        outputs.append(pattern_i @ u + queries_i @ state)
        state = whole_i * state + keys_i @ u
    y = torch.stack(outputs, dim=1).transpose(2, 3)
    return y.reshape(batch, -1, heads, v.shape[-1])[:, :time], state


@dataclass(frozen=True)
class Chunks:
    """T tokens as c chunks of L, and the decays of each head in a chunk, exactly 0 where memory starts anew in between.

    `pairs` (B, c, H, L, L) from after token j up to token i, j ≤ i; `from_start` (B, c, H, L) from the chunk's start up to i;
    `to_end` (B, c, H, L) from after j to its end; `whole` (B, c, H) of the chunk.
    """

    length: int
    missing: int
    pairs: torch.Tensor
    from_start: torch.Tensor
    to_end: torch.Tensor
    whole: torch.Tensor

    @staticmethod
    def of(
        time: int,
        chunk: int,
        batch: int,
        heads: int,
        log_decay: torch.Tensor | None,
        starts: torch.Tensor | None,
        like: torch.Tensor,
    ) -> "Chunks":
        """Work out the decays; float tensors have dtype and device of `like`."""
        length = min(chunk, time)
        missing = -time % length
        before = like.new_ones(length, length, dtype=torch.bool).tril()
        if starts is None:
            allowed, first = before, like.new_ones(length, dtype=torch.bool)
        else:
            document = _cut(starts, length, missing).cumsum(-1)  # (B, c, L): how many have begun in this chunk
            allowed = (before & (document.unsqueeze(-1) == document.unsqueeze(-2))).unsqueeze(2)
            first = (document == 0).unsqueeze(2)
        if log_decay is None:
            shape = (batch, (time + missing) // length, heads, length, length)
            pairs, from_start = (x.to(like.dtype) for x in (allowed, first))
            pairs, from_start = pairs.expand(shape), from_start.expand(shape[:-1])
        else:
            sums = _cut(log_decay, length, missing).transpose(2, 3)  # (B, c, H, L)
            # A sum over the tokens of one's own document: a product with a mask, because others must not even round it.
            sums = sums.cumsum(-1) if starts is None else (allowed.to(like.dtype) @ sums.unsqueeze(-1)).squeeze(-1)
            pairs = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).masked_fill(~allowed, -torch.inf).exp()
            from_start = sums.masked_fill(~first, -torch.inf).exp()
        return Chunks(length, missing, pairs, from_start, pairs[..., -1, :], from_start[..., -1])

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, …) as (B, c, L, …), with zeros after the end."""
        return _cut(x, self.length, self.missing)


def _cut(x: torch.Tensor, length: int, missing: int) -> torch.Tensor:
    if missing:
        x = pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
    return x.unflatten(1, (-1, length))


def decayed_costs(
    heads: int, groups: int, n: int, p: int, time: int, chunk: int = CHUNK, decays: bool = True
) -> tuple[Cost, ...]:
    """What `decayed` costs per token in a sequence of `time` tokens. In float32 it keeps queries and keys twice, as products
    inside a chunk and between chunks read them, values twice, the pattern, and the memories that chunks add and find; what
    decays, with that the scores, and values and answers once more."""
    length = min(chunk, time)
    products = 2.0 * length * (groups * n + heads * p) + 4.0 * heads * n * p
    kept = 4 * groups * n + 2 * heads * p + heads * length + heads * n * p * (2 / length + 1 / time)
    faded = (groups * length + 2 * heads * p + heads * (length + 1)) * decays
    return (
        Cost("products", 0, products, 4.0 * kept, 0.0, f"chunks of {length}"),
        Cost("decay", 0, heads * (3.0 * length + 2.0 * p + 2.0 * n * p / length), 4.0 * faded),
        Cost("state", shape=f"{heads} of {n} × {p}", fixed_state_bytes=4.0 * heads * n * p),
    )


def delta_costs(heads: int, n: int, p: int, time: int, chunk: int = CHUNK) -> tuple[Cost, ...]:
    """The same of `delta`; the triangular solve is half a product. Kept are five patterns of a chunk, queries and keys for each
    product that reads them, the corrections, and the memory that each chunk finds."""
    length = min(chunk, time)
    products, solve = heads * (4.0 * length * n + 2.0 * length * p + 6.0 * n * p), heads * 1.0 * length * (n + p)
    kept = 4.0 * heads * (4 * length + 9 * n + p + n * p / length)
    return (
        Cost("products", 0, products, kept, 0.0, f"chunks of {length}"),
        Cost("solve", 0, solve, 4.0 * heads * (length + n + p)),
        Cost("decay", 0, heads * (5.0 * length + 3.0 * n + 2.0 * p), 4.0 * heads * length),
        Cost("state", shape=f"{heads} of {n} × {p}", fixed_state_bytes=4.0 * heads * n * p),
    )
