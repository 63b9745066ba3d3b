"""What a recipe may write under `pretrain: model:`, every family of model by its few usual numbers or as a whole value tree.

    model: {width: 256, depth: 6, heads: 4}                  a Transformer, as no kind is named
    model: {kind: lstm, width: 256, depth: 2}                another family
    model: {kind: hybrid, width: 256, pattern: MMA}          a pattern of blocks
    model: {kind: decoder, width: 64, layers: [{mixer: …}]}  any value tree of `models`, but for the size of the vocabulary

An architecture is a model without its vocabulary, which the tokenizer settles. The family is open, as those of parts are: a
new member is a new class. The first forms are for people, with defaults from the papers; the last is what `config.json`
holds, and leaves nothing out.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from pydantic import Field, create_model, model_validator

from headspring.artifacts.errors import UserError
from headspring.artifacts.value import Variant
from headspring.models import (
    MLA,
    Attention,
    Block,
    Branch,
    Causal,
    Decoder,
    Encoder,
    Full,
    GatedDelta,
    GatedLinear,
    LinearAttention,
    Mamba,
    Mamba2,
    MoE,
    RMSNorm,
    RoPE,
    SwiGLU,
    pattern,
    repeat,
)
from headspring.models.decoder import hidden_size
from headspring.models.feedforward import FeedForward
from headspring.models.mask import Mask
from headspring.models.mixer import Mixer
from headspring.models.model import Model
from headspring.models.neural_ngram import NeuralNGram
from headspring.models.ngram import NGram
from headspring.models.position import Position
from headspring.models.recurrent import GRU, LSTM, RNN

THETA = 10_000.0


class Architecture(Variant):
    """A model whose vocabulary is not settled. `context` is the longest sequence it accepts."""

    default_kind: ClassVar[str | None] = "transformer"

    context: int = Field(512, gt=0)

    def decoder(self, vocab: int) -> Model:
        """The model that predicts the next token."""
        raise NotImplementedError

    def encoder(self, vocab: int) -> Model:
        """The model that guesses hidden tokens from both sides. Raises `UserError` where the family reads one way only."""
        raise UserError(f"a model of kind {self.kind!r} reads one way; objective: masked is for kinds transformer and encoder")

    def encoder_decoder(self, vocab: int, start: int) -> Model:
        """The model that writes about a source, each answer beginning with `start`. Raises `UserError` for one stack."""
        kinds = "encoder_decoder and vaswani"
        raise UserError(f"a model of kind {self.kind!r} reads no source; objective: spans is for kinds {kinds}")

    def refusal(self) -> UserError:
        """What an architecture of two stacks says to other objectives."""
        return UserError(f"a model of kind {self.kind!r} writes about a source: it needs objective: spans")


# ---- the presets: one block, many times


class Uniform(Architecture):
    """`depth` layers alike of `width` channels; `tied` uses the embedding matrix as the head."""

    kind: str
    width: int = Field(256, gt=0)
    depth: int = Field(6, gt=0)
    tied: bool = True

    def block(self) -> Block:
        """One layer."""
        raise NotImplementedError

    def decoder(self, vocab: int) -> Decoder:
        layers = repeat(self.depth, self.block())
        return Decoder(vocab=vocab, width=self.width, layers=layers, context=self.context, tied=self.tied)


class Transformer(Uniform):
    """`decoder(vocab)` and `encoder(vocab)` are the same stack with other masks.

    `hidden` defaults to 8/3 of the width, which gives SwiGLU the parameters of a fourfold MLP; another `feedforward` takes
    the place of SwiGLU ({kind: moe, experts: 8, top: 2, hidden: 192}). `position` takes the place of RoPE ({kind: alibi},
    {kind: nope}); `window` is how many tokens back a token sees.
    """

    kind: Literal["transformer"] = "transformer"
    heads: int = Field(4, gt=0)
    kv_heads: int | None = Field(None, gt=0)
    hidden: int | None = Field(None, gt=0)
    feedforward: FeedForward | None = None
    position: Position | None = None
    window: int | None = Field(None, gt=0)
    theta: float = Field(THETA, gt=0)
    qk_norm: bool = True

    @model_validator(mode="after")
    def _said_once(self) -> "Transformer":
        if self.hidden is not None and self.feedforward is not None:
            raise ValueError("hidden is the width of the default SwiGLU: give it inside feedforward")
        if self.theta != THETA and self.position is not None:
            raise ValueError("theta is that of the default RoPE: give it inside position")
        return self

    def block(self) -> Block:
        return self._block(Causal(window=self.window))

    def encoder(self, vocab: int) -> Encoder:
        """The same stack, seeing both ways."""
        layers = repeat(self.depth, self._block(Full(window=self.window)))
        return Encoder(vocab=vocab, width=self.width, layers=layers, context=self.context, tied=self.tied)

    def _block(self, mask: Mask) -> Block:
        qk_norm, position = RMSNorm() if self.qk_norm else None, self.position or RoPE(theta=self.theta)
        attention = Attention(heads=self.heads, kv_heads=self.kv_heads, position=position, mask=mask, qk_norm=qk_norm)
        return Block(mixer=attention, feedforward=self.feedforward or _swiglu(self.width, self.hidden))


class MixtureOfExperts(Uniform):
    """A Transformer whose feed-forward parts are `experts` SwiGLUs of `hidden` channels, each token in `top` of them, and one
    of `shared` channels for all (arXiv 2401.04088, 2405.04434). `hidden` defaults to what makes `top` of them one dense part.
    """

    kind: Literal["moe"] = "moe"
    heads: int = Field(4, gt=0)
    kv_heads: int | None = Field(None, gt=0)
    experts: int = Field(8, gt=0)
    top: int = Field(2, gt=0)
    hidden: int | None = Field(None, gt=0)
    shared: int | None = Field(None, gt=0)

    def block(self) -> Block:
        hidden = self.hidden or math.ceil(hidden_size(self.width) / self.top)
        experts = MoE(experts=self.experts, top=self.top, hidden=hidden, shared=self.shared)
        return Block(mixer=Attention(heads=self.heads, kv_heads=self.kv_heads), feedforward=experts)


class LatentAttention(Uniform):
    """A Transformer with multi-head latent attention (arXiv 2405.04434). Per head, `rotary` of the width / heads channels are
    turned (default: half as many again); keys and values come from a `latent` (default: half the width)."""

    kind: Literal["mla"] = "mla"
    heads: int = Field(4, gt=0)
    latent: int | None = Field(None, gt=0)
    query_latent: int | None = Field(None, gt=0)
    rotary: int | None = Field(None, gt=0)
    hidden: int | None = Field(None, gt=0)

    def block(self) -> Block:
        head = max(1, self.width // self.heads)
        rotary = self.rotary or 2 * math.ceil(head / 4)
        latent = self.latent or math.ceil(self.width / 2)
        mixer = MLA(heads=self.heads, head_dim=head, rotary_dim=rotary, latent=latent, query_latent=self.query_latent)
        return Block(mixer=mixer, feedforward=_swiglu(self.width, self.hidden))


class Linear(Uniform):
    """Linear attention with elu + 1 (arXiv 2006.16236) and SwiGLU."""

    kind: Literal["linear_attention"] = "linear_attention"
    heads: int = Field(4, gt=0)
    hidden: int | None = Field(None, gt=0)

    def block(self) -> Block:
        return Block(mixer=LinearAttention(heads=self.heads), feedforward=_swiglu(self.width, self.hidden))


class DeltaNet(Uniform):
    """The gated delta rule (arXiv 2412.06464) and SwiGLU."""

    kind: Literal["gated_delta"] = "gated_delta"
    heads: int = Field(4, gt=0)
    hidden: int | None = Field(None, gt=0)

    def block(self) -> Block:
        return Block(mixer=GatedDelta(heads=self.heads), feedforward=_swiglu(self.width, self.hidden))


class StateSpace(Uniform):
    """Mamba (arXiv 2312.00752): `expand` · width channels that keep `state` numbers each; no feed-forward part."""

    kind: Literal["mamba"] = "mamba"
    state: int = Field(16, gt=0)
    expand: int = Field(2, gt=0)

    def block(self) -> Block:
        return Block(mixer=Mamba(state=self.state, expand=self.expand))


class StateSpaceDuality(Uniform):
    """Mamba-2 (arXiv 2405.21060): heads of `head_dim` channels, each with one decay."""

    kind: Literal["mamba2"] = "mamba2"
    state: int = Field(64, gt=0)
    expand: int = Field(2, gt=0)
    head_dim: int = Field(64, gt=0)

    def block(self) -> Block:
        return Block(mixer=Mamba2(state=self.state, expand=self.expand, head_dim=self.head_dim))


# ---- what came before attention


class RecurrentNetwork(Uniform):
    """`depth` layers, each of which replaces the stream by its memory of `hidden` channels (default: the width), as
    recurrent networks were built (arXiv 1409.2329), but for a norm before each: without it small embeddings are hardly
    heard, and training begins late. `truncate` is how many tokens gradients flow back through."""

    kind: str
    depth: int = Field(2, gt=0)
    hidden: int | None = Field(None, gt=0)
    truncate: int | None = Field(None, gt=0)

    mixer: ClassVar[type[RNN | LSTM | GRU]]

    def block(self) -> Block:
        recurrent = self.mixer(hidden=self.hidden, truncate=self.truncate)
        return Block(mixer=Branch(f=recurrent, residual=False))


class SimpleRecurrent(RecurrentNetwork):
    """Elman 1990; Mikolov et al. 2010."""

    kind: Literal["rnn"] = "rnn"
    mixer: ClassVar = RNN


class LongShortTermMemory(RecurrentNetwork):
    """Hochreiter & Schmidhuber 1997."""

    kind: Literal["lstm"] = "lstm"
    mixer: ClassVar = LSTM


class GatedRecurrent(RecurrentNetwork):
    """arXiv 1406.1078."""

    kind: Literal["gru"] = "gru"
    mixer: ClassVar = GRU


class WindowNetwork(Architecture):
    """The neural n-gram model (Bengio et al. 2003): one layer of `hidden` tanh units (default: four times the width) over the
    vectors of the last `order` − 1 tokens, each normalised."""

    kind: Literal["neural_ngram"] = "neural_ngram"
    width: int = Field(256, gt=0)
    order: int = Field(5, gt=1)
    hidden: int | None = Field(None, gt=0)
    direct: bool = False
    tied: bool = True

    def decoder(self, vocab: int) -> Decoder:
        window = NeuralNGram(order=self.order, hidden=self.hidden or 4 * self.width, direct=self.direct)
        layers = (Block(mixer=Branch(f=window, residual=False)),)
        return Decoder(vocab=vocab, width=self.width, layers=layers, context=self.context, tied=self.tied)


class Counting(Architecture):
    """The n-gram model, counted instead of trained: `order` n, smoothed by modified Kneser–Ney or stupid backoff."""

    kind: Literal["ngram"] = "ngram"
    order: int = Field(5, gt=0)
    smoothing: Literal["kneser_ney", "stupid_backoff"] = "kneser_ney"

    def decoder(self, vocab: int) -> NGram:
        return NGram(vocab=vocab, order=self.order, smoothing=self.smoothing, context=self.context)


# ---- blocks of several kinds


class Hybrid(Architecture):
    """`repeat` times the blocks of `pattern`, one a letter: A attention, D gated delta rule, L linear attention, M Mamba,
    R gated linear recurrence (Griffin's), S Mamba-2, each but M and S with a SwiGLU of `hidden` channels. `blocks` gives
    letters of one's own, or other blocks for these."""

    kind: Literal["hybrid"] = "hybrid"
    width: int = Field(256, gt=0)
    pattern: str = Field("MMA", min_length=1)
    repeat: int = Field(2, gt=0)
    heads: int = Field(4, gt=0)
    hidden: int | None = Field(None, gt=0)
    blocks: dict[str, Block] = Field(default_factory=dict)
    tied: bool = True

    @model_validator(mode="after")
    def _letters_are_known(self) -> "Hybrid":
        pattern(self.pattern, **self._blocks())
        return self

    def _blocks(self) -> Mapping[str, Block]:
        dense = _swiglu(self.width, self.hidden)
        mixers: dict[str, Mixer] = {
            "A": Attention(heads=self.heads),
            "D": GatedDelta(heads=self.heads),
            "L": LinearAttention(heads=self.heads),
            "R": GatedLinear(),
        }
        known = {letter: Block(mixer=mixer, feedforward=dense) for letter, mixer in mixers.items()}
        return known | {"M": Block(mixer=Mamba()), "S": Block(mixer=Mamba2())} | self.blocks

    def decoder(self, vocab: int) -> Decoder:
        layers = pattern(self.pattern * self.repeat, **self._blocks())
        return Decoder(vocab=vocab, width=self.width, layers=layers, context=self.context, tied=self.tied)


def _swiglu(width: int, hidden: int | None) -> SwiGLU:
    return SwiGLU(hidden=hidden or hidden_size(width))


# ---- whole value trees


def _tree(value: type[Model], side: Literal["decoder", "encoder"]) -> type[Architecture]:
    """The architecture with the fields of `value` but its vocabulary; `side` is what it can be."""
    fields: dict[str, Any] = {
        name: (field.annotation, field) for name, field in value.model_fields.items() if name not in ("kind", "vocab")
    }
    kind = value.model_fields["kind"].default

    def described(self: Architecture, vocab: int) -> Model:
        given = {name: getattr(self, name) for name in self.model_fields_set - {"kind"}}
        return value(vocab=vocab, **given)

    def refuse(self: Architecture, vocab: int) -> Model:
        raise UserError(f"a model of kind {kind!r} sees both ways: it needs objective: masked")

    methods = {"decoder": described} if side == "decoder" else {"encoder": described, "decoder": refuse}
    base = type(
        f"{value.__name__}Base", (Architecture,), {"__annotations__": {"kind": str}, "__doc__": value.__doc__, **methods}
    )
    fields["kind"] = (Literal[kind], kind)
    return create_model(f"{value.__name__}Tree", __base__=base, __doc__=value.__doc__, **fields)


TREES = MappingProxyType({"decoder": _tree(Decoder, "decoder"), "encoder": _tree(Encoder, "encoder")})
