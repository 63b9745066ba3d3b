"""What dialects of decoder-only Transformers share: the ends of the model, and words for activations and windows."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from headspring.artifacts.errors import UserError
from headspring.models.attention import Attention
from headspring.models.block import Block, Branch
from headspring.models.decoder import Decoder
from headspring.models.dialects.registry import Dialect, Part, Settings
from headspring.models.dialects.rules import Rule
from headspring.models.mask import Causal
from headspring.models.model import Model

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
FULL, SLIDING = "full_attention", "sliding_attention"


class DecoderDialect(Dialect):
    """A decoder whose layers have a table each; `ends` are the tensors outside the layers, `head` and `embedding` the names
    of the two that may be tied."""

    ends: ClassVar[tuple[Rule, ...]]
    embedding: ClassVar[str]
    head: ClassVar[str] = "lm_head.weight"

    def table(self, block: Block) -> Iterable[Rule]:
        """The rules of a layer, with `{i}` in the place of its number."""
        raise NotImplementedError

    def rules(self, model: Model) -> Iterator[Rule]:
        assert isinstance(model, Decoder)
        yield Rule(self.embedding, "embed.weight")
        yield from self.ends
        if not model.tied:
            yield Rule(self.head, "head.weight")
        for index, block in enumerate(model.layers):
            yield from (rule.at(index) for rule in self.table(block))

    def copies(self, model: Model) -> Mapping[str, str]:
        return {self.head: self.embedding} if isinstance(model, Decoder) and model.tied else {}

    def first(self, model: Model, feedforward: type[Part]) -> tuple[Decoder, Attention, Part]:
        """The model, and the parts of its first layer, which speaks for all where a config has one word for them."""
        decoder = self.part(model, Decoder, "the model")
        attention = self.part(decoder.layers[0].mixer.f, Attention, "layers.0.mixer.f")
        branch = self.part(decoder.layers[0].feedforward, Branch, "layers.0.feedforward")
        return decoder, attention, self.part(branch.f, feedforward, "layers.0.feedforward.f")


def layer_rule(theirs: str, *ours: str, **move: Any) -> Rule:
    """A rule of every layer, in the words of most families."""
    return Rule(theirs, *("layers.{i}." + name for name in ours), **move)


def both(theirs: str, ours: str, bias: bool = True, **move: Any) -> Iterator[Rule]:
    """The weight and the bias of one part of a layer. Only the weight is moved."""
    yield layer_rule(f"{theirs}.weight", f"{ours}.weight", **move)
    if bias:
        yield layer_rule(f"{theirs}.bias", f"{ours}.bias")


def read_activation(config: Settings, key: str) -> Any:
    """Our name of an activation. Raises `UserError` for one that we do not have."""
    if config[key] not in ACTIVATIONS:
        raise UserError(f"config.json: {key} = {config[key]!r} is not supported; those that are: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[config[key]]


def write_activation(activation: str) -> str:
    """Their name of ours."""
    return {"gelu_tanh": "gelu_pytorch_tanh"}.get(activation, activation)


def read_layer_types(config: Settings, otherwise: Sequence[str]) -> list[str]:
    """Which layers have the window. Raises `UserError` for layers of another kind."""
    types = list(config.get("layer_types") or otherwise)
    layers = config.count("num_hidden_layers")
    if len(types) != layers or set(types) - {FULL, SLIDING}:
        shown = f"{types[:6]}{'…' if len(types) > 6 else ''}"
        raise UserError(f"config.json: layer_types = {shown}: must be {FULL} or {SLIDING} for each of {layers} layers")
    return types


def windows_of(model: Decoder) -> list[int | None]:
    """How far each layer sees; None for every token, and where its mixer is no causal attention."""
    masks: Iterator[Any] = (getattr(block.mixer.f, "mask", None) for block in model.layers)
    return [mask.window if isinstance(mask, Causal) and (mask.window or 0) < model.context else None for mask in masks]
