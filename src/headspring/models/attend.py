"""The one place where attention becomes a call of scaled dot-product attention, and the plain form of it.

The fused kernel takes every case but two, a soft-cap on the scores (arXiv 2408.00118) and a learned sink in the denominator
(arXiv 2508.10925): those, and an observer who wants to see the pattern, take the plain form. In training the plain form
goes through the queries in pieces and forms each pattern again for the backward pass, so that memory grows with the
sequence and not with its square; `tiled` shows the algorithm that needs neither the pieces nor torch's autograd.
"""

from dataclasses import dataclass, replace

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from headspring.models import kernels
from headspring.models.context import Visibility

PIECE = 256  # queries whose pattern is held at a time in training


@dataclass(frozen=True)
class Scoring:
    """What becomes of the products q kᵀ before and in the softmax: `scale` (default 1 / sqrt(C)), a `softcap`, a `bias` that
    broadcasts to (B, H, T, S), and the learned logits `sinks` (H,) of keys without a value."""

    scale: float | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def with_bias(self, bias: torch.Tensor | None) -> "Scoring":
        return replace(self, bias=bias)

    @property
    def fused(self) -> bool:
        """Whether a fused kernel can do it."""
        return self.softcap is None and self.sinks is None


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: Visibility, scoring: Scoring) -> torch.Tensor:
    """q (B, H, T, C), k (B, K, S, C) and v (B, K, S, C') with H a multiple of K → (B, H, T, C')."""
    if scoring.fused:
        return attend(q, k, v, visible, scale=scoring.scale, bias=scoring.bias)
    if q.shape[2] <= PIECE or not torch.is_grad_enabled():
        return weigh(scored_pattern(q, k, visible, scoring), v)
    return torch.cat([_piece(q, k, v, visible, scoring, at) for at in range(0, q.shape[2], PIECE)], dim=2)


def _piece(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: Visibility, scoring: Scoring, start: int
) -> torch.Tensor:
    """The answers to the queries from `start` on, whose pattern is not kept."""
    end = min(start + PIECE, q.shape[2])
    keys = end if visible.causal else k.shape[2]
    allowed, bias = visible.mask, scoring.bias
    if allowed is not None:
        allowed = allowed[..., start:end, :keys]
    elif visible.causal:
        allowed = torch.arange(keys, device=q.device) <= torch.arange(start, end, device=q.device)[:, None]
    if bias is not None:
        bias = bias.expand(*bias.shape[:-2], q.shape[2], k.shape[2])[..., start:end, :keys]

    def answer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return weigh(scored_pattern(q, k, Visibility(allowed, causal=False), scoring.with_bias(bias)), v)

    return checkpoint(answer, q[:, :, start:end], k[:, :, :keys], v[:, :, :keys], use_reentrant=False)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: Visibility,
    *,
    scale: float | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q kᵀ · scale + bias) v. q (B, H, T, C), k (B, K, S, C) and v (B, K, S, C') with H a multiple of K
    → (B, H, T, C'). `scale` defaults to 1 / sqrt(C); `bias` broadcasts to (B, H, T, S)."""
    grouped = q.shape[1] != k.shape[1]
    alone = bias is None and scale is None and visible.causal
    if alone and (visible.first is None or kernels.attends_natively(q, v)):
        return kernels.causal_attention(q, k, v, visible.first, visible.origin)
    mask, causal = visible.mask, visible.causal and visible.first is None
    if bias is not None:
        mask, causal = added(bias, visible, q.shape[2], k.shape[2]).to(q.dtype), False
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)


def added(bias: torch.Tensor, visible: Visibility, time: int, keys: int) -> torch.Tensor:
    """`bias`, and −∞ where a key is hidden."""
    allowed = seen(visible, time, keys, bias.device)
    return bias if allowed is None else bias.masked_fill(~allowed, float("-inf"))


def seen(visible: Visibility, time: int, keys: int, device: torch.device) -> torch.Tensor | None:
    """What a visibility says, as one tensor that broadcasts to (B, H, T, S); None where every key is seen."""
    if visible.causal and visible.first is None:
        return torch.ones(time, keys, dtype=torch.bool, device=device).tril()
    return visible.mask


def pattern(
    q: torch.Tensor,
    k: torch.Tensor,
    visible: Visibility,
    *,
    scale: float | None = None,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The attention pattern (B, H, T, S) float32, in the obvious lines. `sinks` (H,) are logits of keys without a value:
    they enter the denominator only."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q.float() @ k.float().mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    allowed = seen(visible, q.shape[2], k.shape[2], q.device)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    if sinks is None:
        return scores.softmax(dim=-1)
    column = sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]


def scored_pattern(q: torch.Tensor, k: torch.Tensor, visible: Visibility, scoring: Scoring) -> torch.Tensor:
    """`pattern` by a `Scoring`."""
    return pattern(q, k, visible, scale=scoring.scale, bias=scoring.bias, softcap=scoring.softcap, sinks=scoring.sinks)


def weigh(pattern: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The values (B, K, S, C) averaged by a pattern (B, H, T, S) → (B, H, T, C)."""
    return pattern.to(v.dtype) @ v.repeat_interleave(pattern.shape[1] // v.shape[1], dim=1)


def attend_plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend` by its definition, for reference: (B, H, T, C), and the pattern (B, H, T, S) float32."""
    made = pattern(q, k, Visibility(mask, causal))
    return weigh(made, v), made
