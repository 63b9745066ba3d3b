"""From a text's hidden states to one vector: an embedding.

| mode | the vector of a text | who uses it |
| --- | --- | --- |
| `mean` | the mean of all its tokens' states | Sentence-BERT (arXiv 1908.10084), MiniLM, E5 |
| `first` | the state of its first token | BGE, SimCSE (arXiv 2104.08821) |
| `last` | the state of its last token, the only one that has seen all of a text where a model is causal | E5-Mistral |
| `max` | the largest state of each channel | Sentence-BERT's comparison |
| `pooler` | `first` through the encoder's own pooler | BERT |

Normalised vectors compare by their dot product, which then is the cosine of the angle between them.
"""

from typing import Literal

import torch
from pydantic import Field

from headspring.artifacts.errors import UserError
from headspring.artifacts.value import Value
from headspring.models.encoder import EncoderModule
from headspring.models.model import ModelModule

Mode = Literal["mean", "first", "last", "max", "pooler"]


class Pooling(Value):
    """How a model's hidden states become one vector. `max_tokens` is where texts are cut (default: at the model's context)."""

    mode: Mode = "mean"
    normalize: bool = True
    max_tokens: int | None = Field(None, gt=0)


def pool(model: ModelModule, hidden: torch.Tensor, padding: torch.Tensor | None, pooling: Pooling) -> torch.Tensor:
    """(B, T, D) of rows with `padding` (B,) pads at their left → (B, D) float32."""
    padding = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device) if padding is None else padding
    vectors = _pooled(model, hidden, padding, pooling.mode).float()
    return torch.nn.functional.normalize(vectors, dim=-1) if pooling.normalize else vectors


def _pooled(model: ModelModule, hidden: torch.Tensor, padding: torch.Tensor, mode: Mode) -> torch.Tensor:
    if mode == "last":
        return hidden[:, -1]
    if mode in ("first", "pooler"):
        first = hidden[torch.arange(len(hidden), device=hidden.device), padding]
        if mode == "first":
            return first
        if not isinstance(model, EncoderModule):
            raise UserError("pooling by 'pooler' needs an encoder that has one; use 'mean', 'first' or 'last'")
        return model.pooled(first)
    real = (torch.arange(hidden.shape[1], device=hidden.device) >= padding[:, None])[..., None]
    if mode == "max":
        return hidden.masked_fill(~real, float("-inf")).amax(1)
    return (hidden.float() * real).sum(1) / real.sum(1)
