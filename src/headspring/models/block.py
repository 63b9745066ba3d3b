"""A block is a sequence of residual branches; where its norms stand is three optional slots around each.

    x ← out(skip · x + post(f(pre(x))))

Pre-norm fills the first slot, post-norm the last, a sandwich the first two. A branch without `residual` replaces x.
A `parallel` block adds branches that all read the same x (arXiv 2204.06745); its own `pre` is a norm they share.
In the decoder of an encoder–decoder a branch `cross` stands between the two: it reads what the encoder read.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import nn

from headspring.artifacts.value import Value
from headspring.models import kernels
from headspring.models.context import Context
from headspring.models.feedforward import FeedForward, FeedForwardModule
from headspring.models.mixer import Mixer, MixerModule
from headspring.models.norm import Norm, RMSNorm, RMSNormModule
from headspring.models.part import Cost, PartModule
from headspring.models.ragged import each
from headspring.models.state import LayerState, MemoryState, ReadingState, ReadingStates


class Branch(Value):
    """One residual branch around `f`. `skip` multiplies the stream that passes it (DeepNorm's alpha, arXiv 2203.00555)."""

    kind: Literal["branch"] = "branch"
    f: Mixer | FeedForward
    pre: Norm | None = RMSNorm()
    post: Norm | None = None
    out: Norm | None = None
    residual: bool = True
    skip: float = Field(1.0, gt=0)

    @field_validator("f", mode="before")
    @classmethod
    def _by_kind(cls, value: object) -> object:
        """A mapping goes to the family that knows its kind, so that an error speaks of that part alone."""
        if isinstance(value, dict):
            family = FeedForward if value.get("kind") in FeedForward.kinds else Mixer
            return family.choose(value)
        return value


class Block(Value):
    """What mixes tokens, and what works on each token (which a state-space block may lack). A bare `Attention(...)` means a
    pre-norm branch."""

    kind: Literal["block"] = "block"
    mixer: Branch
    cross: Branch | None = None
    feedforward: Branch | None = None
    parallel: bool = False
    pre: Norm | None = None

    @field_validator("mixer", "cross", "feedforward", mode="before")
    @classmethod
    def _wrap(cls, value: object) -> object:
        if isinstance(value, Branch) or value is None:
            return value
        if isinstance(value, dict):
            return value if value.get("kind", "branch") == "branch" and "f" in value else {"f": value}
        return Branch(f=value)

    @model_validator(mode="after")
    def _belongs_together(self) -> "Block":
        if not isinstance(self.mixer.f, Mixer):
            raise ValueError(f"the mixer of a block cannot be of kind {self.mixer.f.kind!r}, which works on each token alone")
        if self.mixer.f.reads_memory:
            raise ValueError(f"{self.mixer.f.kind!r} reads another sequence: give it as cross, beside a mixer of the tokens")
        if self.cross is not None and not (isinstance(self.cross.f, Mixer) and self.cross.f.reads_memory):
            kind = self.cross.f.kind
            raise ValueError(f"cross cannot be of kind {kind!r}, which does not read an encoder; use cross_attention")
        if self.cross is not None and self.parallel:
            raise ValueError("a parallel block has no cross: what to ask the encoder is known after the mixer")
        if self.feedforward is not None and not isinstance(self.feedforward.f, FeedForward):
            raise ValueError(f"the feedforward of a block cannot be of kind {self.feedforward.f.kind!r}, which mixes tokens")
        if self.pre is not None and not self.parallel:
            raise ValueError("a norm shared by the branches (pre) needs parallel: true")
        return self

    @property
    def branches(self) -> tuple[Branch, ...]:
        """What adds to the stream, in order."""
        return tuple(slot for name in type(self).model_fields if isinstance(slot := getattr(self, name), Branch))

    def build(self, width: int) -> "BlockModule":
        return BlockModule(self, width)


def repeat(count: int, block: Block) -> tuple[Block, ...]:
    """The same block `count` times, each with weights of its own."""
    return (block,) * count


def pattern(letters: str, **blocks: Block) -> tuple[Block, ...]:
    """One block a letter: `pattern("MMA", M=Block(Mamba()), A=Block(Attention(), SwiGLU(96)))`."""
    unknown = sorted(set(letters) - set(blocks))
    if unknown or not letters:
        raise ValueError(f"pattern {letters!r} uses {unknown or 'nothing'}, and the blocks are named {sorted(blocks)}")
    return tuple(blocks[letter] for letter in letters)


class BranchModule(nn.Module):
    """The slots of a branch, as modules; `combine` is the formula of this file."""

    def __init__(self, value: Branch, width: int):
        super().__init__()
        self.f: MixerModule | FeedForwardModule = value.f.build(width)
        self.pre = value.pre.build(width) if value.pre else None
        self.post = value.post.build(width) if value.post else None
        self.out = value.out.build(width) if value.out else None
        self.residual, self.skip = value.residual, value.skip

    def read(self, x: torch.Tensor, y: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The stream, x + y, and what `f` sees of it."""
        if isinstance(self.pre, RMSNormModule):
            return kernels.add_rms_norm(x, y, self.pre.gain_for(x), self.pre.epsilon)
        x = x if y is None else x + y
        return x, x if self.pre is None else self.pre(x)

    @property
    def only_adds(self) -> bool:
        """Whether `combine` is x + y."""
        return self.residual and self.skip == 1.0 and self.post is None and self.out is None

    def combine(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The stream after `f` gave `y`."""
        if self.post is not None:
            y = self.post(y)
        if self.residual:
            y = (x if self.skip == 1.0 else self.skip * x) + y
        return y if self.out is None else self.out(y)

    def cost(self, name: str, context_length: int) -> Cost:
        main = self.f.cost(name, context_length) if isinstance(self.f, MixerModule) else self.f.cost(name)
        slots = (("pre", self.pre), ("post", self.post), ("out", self.out))
        norms = tuple(slot.cost(f"{name}.{label}") for label, slot in slots if slot is not None)
        return Cost.sum(name, (*main.children, *norms), main.shape)


class BlockModule(PartModule):
    """x (B, T, D) → (B, T, D)."""

    def __init__(self, value: Block, width: int):
        super().__init__()
        self.parallel, self.width = value.parallel, width
        self.pre = value.pre.build(width) if value.pre else None
        self.mixer = BranchModule(value.mixer, width)
        self.cross = BranchModule(value.cross, width) if value.cross else None
        self.feedforward = BranchModule(value.feedforward, width) if value.feedforward else None

    @property
    def mixes(self) -> MixerModule:
        """The mixer, without the slots around it."""
        assert isinstance(self.mixer.f, MixerModule)
        return self.mixer.f

    def forward(self, x: torch.Tensor, context: Context, state: LayerState | None = None) -> torch.Tensor:
        x = self.site("residual.pre", x)
        if self.parallel:
            return self.site("residual.post", self._parallel(x, context, state))
        memory: Any = None
        if isinstance(state, ReadingState | ReadingStates):
            memory, state = state.memory, state.own
        x, read = self.mixer.read(x)
        x, y = self._added(self.mixer, x, self._mixed(read, context, state), "residual.mid", self.cross or self.feedforward)
        if self.cross is not None:
            x, read = self.cross.read(x, y)
            x, y = self._added(self.cross, x, self.cross.f(read, context, memory), "residual.cross", self.feedforward)
        if self.feedforward is not None:
            x, read = self.feedforward.read(x, y)
            x = self.feedforward.combine(x, self.feedforward.f(read))
        return self.site("residual.post", x)

    def _mixed(self, x: torch.Tensor, context: Context, state: LayerState | None) -> torch.Tensor:
        """The mixer's answer, to all sequences of the row at once or to one after the other."""
        if context.ragged is None or self.mixes.pages:
            return self.mixes(x, context, state)
        return each(self.mixes, x, context.ragged, state)  # type: ignore[arg-type]

    def _added(
        self, branch: BranchModule, x: torch.Tensor, y: torch.Tensor, site: str, after: BranchModule | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The stream after a branch. Where that is x + y and nobody looks, the sum is left to the norm of the branch after."""
        if after is None or self.tap is not None or not branch.only_adds:
            return self.site(site, branch.combine(x, y)), None
        return x, y

    def _parallel(self, x: torch.Tensor, context: Context, state: LayerState | None) -> torch.Tensor:
        """Both branches read the same."""
        read = x if self.pre is None else self.pre(x)
        middle = self.mixer.combine(x, self._mixed(self.mixer.read(read)[1], context, state))
        middle = self.site("residual.mid", middle)
        if self.feedforward is None:
            return middle
        return self.feedforward.combine(middle, self.feedforward.f(self.feedforward.read(read)[1]))

    def new_state(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> LayerState:
        """An empty memory for `batch` rows of up to `capacity` tokens."""
        own = self.mixes.new_state(batch, capacity, dtype, device)
        return own if self.cross is None else ReadingState(own, MemoryState())

    def owners(self, name: str) -> Iterator[tuple[str, PartModule, tuple[str, ...]]]:
        """The modules that have sites: prefix, module, names."""
        crossed = () if self.cross is None else ("residual.cross",)
        yield name, self, ("residual.pre", "residual.mid", *crossed, "residual.post")
        yield f"{name}.mixer", self.mixes, self.mixes.site_names
        if self.cross is not None:
            yield f"{name}.cross", self.cross.f, self.cross.f.site_names
        if self.feedforward is not None:
            yield f"{name}.mlp", self.feedforward.f, self.feedforward.f.site_names

    def prepare(self, context: Context) -> None:
        if context.ragged is None or self.mixes.pages:
            self.mixes.prepare(context)
        if self.cross is not None and isinstance(self.cross.f, MixerModule):
            self.cross.f.prepare(context)

    def cost(self, name: str, context_length: int) -> Cost:
        parts = [self.mixer.cost("mixer", context_length)]
        if self.cross is not None:
            parts.append(self.cross.cost("cross", context_length))
        if self.feedforward is not None:
            parts.append(self.feedforward.cost("mlp", context_length))
        if self.pre is not None:
            parts.append(self.pre.cost("pre"))
        if self.parallel and self.feedforward is not None:
            parts.append(Cost("read twice", activation_bytes=-2.0 * self.width))  # both branches have counted it
        return Cost.sum(name, tuple(parts))
