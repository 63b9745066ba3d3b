"""A block is a sequence of residual branches; where its norms stand is three optional slots around each.

    x ← out(x + post(f(pre(x))))

Pre-norm fills the first slot, post-norm the last, a sandwich the first two. A branch without `residual` replaces x.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator
from torch import nn

from headspring.artifacts.value import Value
from headspring.models.attend import Context
from headspring.models.attention import Attention, AttentionModule
from headspring.models.feedforward import MLP, SwiGLU
from headspring.models.norm import LayerNorm, RMSNorm
from headspring.models.part import Cost, PartModule
from headspring.models.state import KeyValueState

Norm = Annotated[RMSNorm | LayerNorm, Field(discriminator="kind")]
Mixer = Annotated[Attention, Field()]
FeedForward = Annotated[SwiGLU | MLP, Field(discriminator="kind")]


class Branch(Value):
    """One residual branch around `f` (a mixer or a feed-forward)."""

    kind: Literal["branch"] = "branch"
    f: Annotated[Attention | SwiGLU | MLP, Field(discriminator="kind")]
    pre: Norm | None = RMSNorm()
    post: Norm | None = None
    out: Norm | None = None
    residual: bool = True


class Block(Value):
    """Two branches: what mixes tokens, and what works on each token. A bare `Attention(...)` means a pre-norm branch."""

    kind: Literal["block"] = "block"
    mixer: Branch
    feedforward: Branch

    @field_validator("mixer", "feedforward", mode="before")
    @classmethod
    def _wrap(cls, value: object) -> object:
        if isinstance(value, Branch):
            return value
        if isinstance(value, dict):
            return value if value.get("kind", "branch") == "branch" and "f" in value else {"f": value}
        return Branch(f=value)

    def build(self, width: int) -> "BlockModule":
        return BlockModule(self, width)


def repeat(count: int, block: Block) -> tuple[Block, ...]:
    """The same block `count` times, each with weights of its own."""
    return (block,) * count


class BranchModule(nn.Module):
    """The slots of a branch, as modules; `combine` is the formula of this file."""

    def __init__(self, value: Branch, width: int):
        super().__init__()
        self.f = value.f.build(width)
        self.pre = value.pre.build(width) if value.pre else None
        self.post = value.post.build(width) if value.post else None
        self.out = value.out.build(width) if value.out else None
        self.residual = value.residual

    def combine(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.post is not None:
            y = self.post(y)
        x = x + y if self.residual else y
        return x if self.out is None else self.out(x)

    def cost(self, name: str, context_length: int) -> Cost:
        main = self.f.cost(name, context_length) if isinstance(self.f, AttentionModule) else self.f.cost(name)
        slots = (("pre", self.pre), ("post", self.post), ("out", self.out))
        norms = tuple(slot.cost(f"{name}.{label}") for label, slot in slots if slot is not None)
        return Cost.sum(name, (*main.children, *norms), main.shape)


class BlockModule(PartModule):
    """x (B, T, D) → (B, T, D)."""

    def __init__(self, value: Block, width: int):
        super().__init__()
        self.mixer = BranchModule(value.mixer, width)
        self.feedforward = BranchModule(value.feedforward, width)

    def forward(self, x: torch.Tensor, context: Context, state: KeyValueState | None = None) -> torch.Tensor:
        x = self.site("residual.pre", x)
        branch = self.mixer
        x = branch.combine(x, branch.f(x if branch.pre is None else branch.pre(x), context, state))
        x = self.site("residual.mid", x)
        branch = self.feedforward
        x = branch.combine(x, branch.f(x if branch.pre is None else branch.pre(x)))
        return self.site("residual.post", x)

    def cost(self, name: str, context_length: int) -> Cost:
        mixer = self.mixer.cost("mixer", context_length)
        return Cost.sum(name, (mixer, self.feedforward.cost("mlp", context_length)))
