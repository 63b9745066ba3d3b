"""Which token may look at which, and the one place where that becomes a call of scaled dot-product attention.

Three facts decide the mask: a query sees keys at its own place and before (causal), in its own packed document
(`segments`), and not in the left padding of its row (`padding`). A cache only shifts the places of the queries.
Where none but the first applies, the fused causal kernel runs and no mask is ever built.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from headspring.models import kernels


@dataclass(frozen=True)
class Context:
    """What the mixers of one forward pass share.

    `mask` (B or 1, 1, T, S) bool is True where a query may look at a key. Without one, `causal` says whether the T
    queries are the T keys in order (each sees those before it), or every query sees every key.
    """

    mask: torch.Tensor | None
    causal: bool
    cos: torch.Tensor  # (B or 1, T, C/2) float32
    sin: torch.Tensor


def mask_and_positions(
    time: int,
    past: int,
    segments: torch.Tensor | None,
    padding: torch.Tensor | None,
    device: torch.device,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The mask (or None where none is needed) and positions (B or 1, T) of `time` tokens that follow `past` cached ones.

    `segments` (B, T) numbers packed documents (not with a cache); `padding` (B,) counts the pads at the left of a row.
    Positions count from 0 at each document's (or row's) first token.
    """
    query = torch.arange(past, past + time, device=device)
    positions = query[None]
    if segments is None and padding is None and (past == 0 or time == 1):
        return None, positions
    key = torch.arange(past + time, device=device)
    mask = (key <= query[:, None])[None]  # (1, T, S)
    if padding is not None:
        mask = mask & (key >= padding[:, None, None])
        positions = (positions - padding[:, None]).clamp(min=0)
        # A pad's own row would have no key at all, and a softmax over nothing is NaN: let it see itself.
        mask = mask | (key == query[:, None])
    if segments is not None:
        mask = mask & (segments[:, :, None] == segments[:, None, :])
        starts = torch.ones_like(segments, dtype=torch.bool)
        starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
        first = torch.where(starts, query, torch.zeros_like(query)).cummax(dim=1).values
        positions = positions - first
    return mask[:, None], positions


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool) -> torch.Tensor:
    """softmax(q kᵀ / sqrt(C)) v. q (B, H, T, C), k and v (B, K, S, C) with H a multiple of K → (B, H, T, C)."""
    grouped = q.shape[1] != k.shape[1]
    if causal and not grouped:
        return kernels.causal_attention(q, k, v)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


def attend_plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in three obvious lines, for reference and for looking: also returns the pattern (B, H, T, S) float32."""
    time, keys, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q.float() @ k.float().mT) * q.shape[-1] ** -0.5
    if causal:
        mask = torch.ones(time, keys, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    pattern = scores.softmax(dim=-1)
    return (pattern.to(v.dtype) @ v), pattern
