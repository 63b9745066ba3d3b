"""The decoder-only language model (arXiv 1706.03762, in the pre-norm form of arXiv 2302.13971 by default).

    tokens (B, T) → embed → blocks → norm → hidden (B, T, D) → head → logits (B, T, V)

`Decoder` is the value: a frozen description that reads like its paper's table and round-trips through JSON. `build()`
makes the module. The forward pass stops at the hidden states, because training must never hold a full (B·T, V) float32
tensor: `scoring` takes the head in chunks.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from headspring.artifacts.value import Value
from headspring.models.attend import Context, mask_and_positions
from headspring.models.attention import Attention, AttentionModule
from headspring.models.block import Block, BlockModule, Norm
from headspring.models.norm import RMSNorm
from headspring.models.part import Cost, ParameterRule, PartModule, normal
from headspring.models.position import RoPE
from headspring.models.sites import Sites
from headspring.models.state import State

EMBEDDING_STD = 0.02


class Decoder(Value):
    """`vocab` tokens, `width` channels, one value a layer. `context` is the longest sequence the model accepts.

    `tied` uses the embedding matrix as the head.
    """

    kind: Literal["decoder"] = "decoder"
    vocab: int = Field(gt=0)
    width: int = Field(gt=0)
    layers: tuple[Block, ...] = Field(min_length=1)
    context: int = Field(2048, gt=0)
    norm: Norm = RMSNorm()
    tied: bool = True

    @model_validator(mode="after")
    def _one_rotation(self) -> "Decoder":
        if len({(position.theta, channels) for position, channels in self._rotations()}) > 1:
            raise ValueError("all layers must share one rotary theta and head size")
        for layer in self.layers:
            if not isinstance(layer.mixer.f, Attention) or isinstance(layer.feedforward.f, Attention):
                raise ValueError("a block's mixer must be attention and its feedforward must not be")
        return self

    def _rotations(self) -> list[tuple[RoPE, int]]:
        mixers = [layer.mixer.f for layer in self.layers if isinstance(layer.mixer.f, Attention)]
        return [(m.position, m.head_dim or self.width // m.heads) for m in mixers if isinstance(m.position, RoPE)]

    def build(self, seed: int = 0) -> "DecoderModule":
        """A freshly initialised module, in float32 on the CPU. The same seed gives the same weights."""
        model = DecoderModule(self)
        model.initialise(seed)
        return model


class Embedding(PartModule):
    """(V, D) rows; also the head where it is tied."""

    def __init__(self, vocab: int, width: int, group: Literal["embedding", "head"], std: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, width))
        self.group: Literal["embedding", "head"] = group
        self.std = std

    def rules(self) -> dict[str, ParameterRule]:
        return {"weight": ParameterRule(normal(self.std), self.group)}


class DecoderModule(PartModule):
    """The module of a `Decoder`. `compute_dtype` is the dtype of activations; parameters keep their own."""

    def __init__(self, config: Decoder):
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.embed = Embedding(config.vocab, config.width, "embedding", EMBEDDING_STD)
        self.layers = nn.ModuleList(block.build(config.width) for block in config.layers)
        self.norm = config.norm.build(config.width)
        self.head = None if config.tied else Embedding(config.vocab, config.width, "head", EMBEDDING_STD)
        self.checkpoint_activations = False
        self.sites = Sites(self._site_owners())
        self.rules_by_name = self._collect_rules()
        self._rotary_tables: tuple[torch.Tensor, torch.Tensor] | None = None

    # ---- what the module is made of

    def _site_owners(self) -> dict[str, tuple[PartModule, tuple[str, ...]]]:
        owners: dict[str, tuple[PartModule, tuple[str, ...]]] = {"": (self, ("embed", "final"))}
        for index, block in enumerate(self.layers):
            assert isinstance(block, BlockModule)
            owners[f"layers.{index}"] = (block, ("residual.pre", "residual.mid", "residual.post"))
            owners[f"layers.{index}.mixer"] = (block.mixer.f, ("q", "k", "v", "pattern", "heads", "out"))
            owners[f"layers.{index}.mlp"] = (block.feedforward.f, ("gate", "act", "out"))
        return owners

    def _collect_rules(self) -> dict[str, ParameterRule]:
        """Every parameter's rule by its name. Raises where a parameter has none."""
        rules = {}
        for prefix, module in self.named_modules():
            if isinstance(module, PartModule):
                rules.update({f"{prefix}.{name}".lstrip("."): rule for name, rule in module.rules().items()})
        missing = {name for name, _ in self.named_parameters()} ^ set(rules)
        if missing:
            raise ValueError(f"parameters without a rule, or rules without a parameter: {sorted(missing)}")
        return rules

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Fill every parameter by its rule, in order of name."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in sorted(self.named_parameters()):
            self.rules_by_name[name].init(parameter, generator)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def output_weight(self) -> torch.Tensor:
        """The head's matrix (V, D)."""
        return self.embed.weight if self.head is None else self.head.weight

    @contextmanager
    def computing_in(self, dtype: torch.dtype) -> Iterator[None]:
        """Activations in `dtype` inside the block."""
        before, self.compute_dtype = self.compute_dtype, dtype
        try:
            yield
        finally:
            self.compute_dtype = before

    # ---- the forward pass

    def forward(
        self,
        tokens: torch.Tensor,
        state: State | None = None,
        segments: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states (B, T, D), in `compute_dtype`, of tokens (B, T) int64.

        With a `state` the tokens follow those it holds, and are added to it. `segments` (B, T) keeps packed documents
        apart. `padding` (B,) int64 counts left pads in each row; with a state it is given once, at the first call.
        """
        context = self._context(tokens.shape[1], state, segments, padding)
        x = nn.functional.embedding(tokens, self.embed.weight).to(self.compute_dtype)
        x = self.site("embed", x)
        for index, block in enumerate(self.layers):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, x, context, use_reentrant=False)
            else:
                x = block(x, context, None if state is None else state.layers[index])
        return self.site("final", self.norm(x))

    def _context(self, time: int, state: State | None, segments: torch.Tensor | None, padding: torch.Tensor | None) -> Context:
        past = 0
        if state is not None:
            if segments is not None:
                raise ValueError("segments cannot be used with a state: documents would see each other's cache")
            past = state.length
            if padding is not None:
                if past:
                    raise ValueError("padding is given with the first tokens of a state only")
                state.padding = padding
            padding = state.padding
        if past + time > self.config.context:
            raise ValueError(f"{past + time} tokens are more than the model's context of {self.config.context}")
        mask, positions = mask_and_positions(time, past, segments, padding, self.device)
        cos, sin = self._rotary()
        return Context(mask, mask is None and past == 0, cos[positions], sin[positions])

    def _rotary(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._rotary_tables is None or self._rotary_tables[0].device != self.device:
            rotations = self.config._rotations()
            position, channels = rotations[0] if rotations else (RoPE(), 2)
            self._rotary_tables = position.tables(self.config.context, channels, self.device)
        return self._rotary_tables

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., D) → (..., V) float32."""
        return nn.functional.linear(hidden, self.output_weight.to(hidden.dtype)).float()

    def new_state(self, batch: int, capacity: int | None = None) -> State:
        """An empty memory for `batch` rows of up to `capacity` tokens (default: the model's context)."""
        capacity = min(capacity or self.config.context, self.config.context)
        layers = []
        for block in self.layers:
            assert isinstance(block, BlockModule) and isinstance(block.mixer.f, AttentionModule)
            layers.append(block.mixer.f.new_state(batch, capacity, self.compute_dtype, self.device))
        return State(layers, capacity)

    # ---- what it costs

    def ledger(self, context_length: int | None = None) -> Cost:
        """Parameters, FLOPs, activation and state bytes per token, by part, at sequences of `context_length` tokens."""
        length = context_length or self.config.context
        vocab, width = self.config.vocab, self.config.width
        embed = Cost("embed", self.embed.weight.numel(), 0.0, 2.0 * width, 0.0, f"{vocab} × {width}")
        blocks = []
        for index, block in enumerate(self.layers):
            assert isinstance(block, BlockModule)
            blocks.append(block.cost(f"layers.{index}", length))
        parameters = 0 if self.head is None else self.head.weight.numel()
        shape = "tied" if self.head is None else f"{width} → {vocab}"
        head = Cost("head", parameters, 2.0 * vocab * width, 2.0 * width, 0.0, shape)
        return Cost.sum("decoder", (embed, *blocks, self.norm.cost("norm"), head))

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def __repr__(self) -> str:
        from headspring.models.drawing import draw

        return draw(self.ledger())


def hidden_size(width: int, ratio: float = 8 / 3, multiple: int = 32) -> int:
    """The feed-forward width that gives SwiGLU the parameters of a 4× MLP, rounded up to a friendly multiple."""
    return multiple * math.ceil(width * ratio / multiple)
