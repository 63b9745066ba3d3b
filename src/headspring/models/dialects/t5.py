"""T5 (arXiv 1910.10683), its version 1.1 (2002.05202) and what was trained from that (Flan-T5, 2210.11416; mT5 has a name
of its own).

| version | feed-forward | head | hidden states before it |
| --- | --- | --- | --- |
| 1.0 | relu | the shared table | times D^(−1/2) |
| 1.1 | gated gelu (tanh) | a matrix of its own | as they are |

Traps: scores have no factor 1/√C (the initialisation absorbed it). The relative bias stands in the first block of each
stack and serves the others; the cross-attention has none. There is no longest sequence: `n_positions`, where a file has it,
says what the model was trained with. Newer `transformers` write `tie_word_embeddings: true` for version 1.1, too, and say
with `scale_decoder_outputs` which of the two it is.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from headspring.artifacts.errors import UserError
from headspring.models.attention import Attention
from headspring.models.block import Block, Branch
from headspring.models.cross_attention import CrossAttention
from headspring.models.decoder import Decoder
from headspring.models.dialects.registry import Dialect, Settings, dialect
from headspring.models.dialects.rules import Rule, expand
from headspring.models.embedding import Head
from headspring.models.encoder import Encoder
from headspring.models.encoder_decoder import EncoderDecoder
from headspring.models.feedforward import MLP, FeedForward, Gated
from headspring.models.mask import Causal, Full, Mask
from headspring.models.model import Model
from headspring.models.norm import RMSNorm
from headspring.models.position import SharedBias, T5Bias

GATED_GELU = "gated-gelu"
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "silu": "silu"}
CONTEXT = 512  # where a file does not say what the model was trained with


@dialect
class T5(Dialect):
    architecture, model_type = "T5ForConditionalGeneration", "t5"
    defaults = {
        "num_decoder_layers": None,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "relu",
        "tie_word_embeddings": True,
        "scale_decoder_outputs": None,
        "decoder_start_token_id": 0,
        "n_positions": CONTEXT,
    }
    fixed = {"is_encoder_decoder": True, "is_decoder": False}
    ignored = ("*.EncDecAttention.relative_attention_bias.weight",)  # old files have one that nothing reads

    def model(self, config: Settings) -> EncoderDecoder:
        tied, depth = self._tied(config), config.count("num_layers")
        sizes = {"vocab": config["vocab_size"], "width": config["d_model"], "context": config["n_positions"]}
        norm = RMSNorm(epsilon=config["layer_norm_epsilon"])
        deep = depth if config["num_decoder_layers"] is None else config.count("num_decoder_layers")
        head = Head(scale=config["d_model"] ** -0.5 if tied else None)
        return EncoderDecoder(
            encoder=Encoder(**sizes, layers=self._layers(config, depth, Full(), reads=False), norm=norm, head=None),
            decoder=Decoder(**sizes, layers=self._layers(config, deep, Causal(), reads=True), norm=norm, tied=tied, head=head),
            start=config["decoder_start_token_id"],
        )

    def _tied(self, config: Settings) -> bool:
        """Version 1.0, in which the head is the table and hidden states are scaled."""
        scaled = config["scale_decoder_outputs"]
        return bool(config["tie_word_embeddings"] if scaled is None else scaled and config["tie_word_embeddings"])

    def _layers(self, config: Settings, depth: int, mask: Mask, reads: bool) -> tuple[Block, ...]:
        norm = RMSNorm(epsilon=config["layer_norm_epsilon"])
        same = {"heads": config["num_heads"], "head_dim": config["d_kv"], "qk_norm": None, "scale": 1.0}
        table = T5Bias(buckets=config["relative_attention_num_buckets"], max_distance=config["relative_attention_max_distance"])
        cross = Branch(f=CrossAttention(**same), pre=norm) if reads else None
        feedforward = Branch(f=self._feedforward(config), pre=norm)

        def block(index: int) -> Block:
            attention = Attention(position=SharedBias() if index else table, mask=mask, **same)
            return Block(mixer=Branch(f=attention, pre=norm), cross=cross, feedforward=feedforward)

        return tuple(block(index) for index in range(depth))

    def _feedforward(self, config: Settings) -> FeedForward:
        """`gated-gelu` is the one with tanh, whatever `gelu` is elsewhere."""
        said = config["feed_forward_proj"]
        gated, name = said.startswith("gated-"), said.removeprefix("gated-")
        activation = "gelu_tanh" if said == GATED_GELU else ACTIVATIONS.get(name)
        if activation is None:
            known = ", ".join([*ACTIVATIONS, GATED_GELU])
            raise UserError(f"config.json: feed_forward_proj = {said!r} is not supported; those that are: {known}")
        kind = Gated if gated else MLP
        return kind(hidden=config["d_ff"], activation=activation)

    def config(self, model: Model) -> dict[str, Any]:
        """The first layer of the decoder speaks for all."""
        model = self.part(model, EncoderDecoder, "the model")
        block, where = model.decoder.layers[0], "decoder.layers.0"
        attention = self.part(block.mixer.f, Attention, f"{where}.mixer.f")
        table = self.part(attention.position, T5Bias, f"{where}.mixer.f.position")
        feedforward = self.part(block.feedforward, Branch, f"{where}.feedforward").f
        if not isinstance(feedforward, MLP):
            feedforward = self.part(feedforward, Gated, f"{where}.feedforward.f")
        return {
            "vocab_size": model.vocab,
            "d_model": model.width,
            "d_kv": attention.head_dim or model.width // attention.heads,
            "d_ff": feedforward.hidden,
            "num_layers": len(model.encoder.layers),
            "num_decoder_layers": len(model.decoder.layers),
            "num_heads": attention.heads,
            "relative_attention_num_buckets": table.buckets,
            "relative_attention_max_distance": table.max_distance,
            "layer_norm_epsilon": self.part(model.decoder.norm, RMSNorm, "decoder.norm").epsilon,
            "feed_forward_proj": self._word(feedforward),
            "tie_word_embeddings": model.decoder.tied,
            "scale_decoder_outputs": model.decoder.tied,
            "decoder_start_token_id": model.start,
            "n_positions": model.context,
        }

    def _word(self, feedforward: MLP | Gated) -> str:
        if isinstance(feedforward, Gated) and feedforward.activation == "gelu_tanh":
            return GATED_GELU
        names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
        if feedforward.activation not in names:
            raise UserError(f"{self.architecture} has no word for the activation {feedforward.activation!r}")
        return f"{'gated-' * isinstance(feedforward, Gated)}{names[feedforward.activation]}"

    def rules(self, model: Model) -> Iterator[Rule]:
        assert isinstance(model, EncoderDecoder)
        yield Rule("shared.weight", "encoder.embed.weight")
        for side, stack in (("encoder", model.encoder), ("decoder", model.decoder)):
            first = stack.layers[0].feedforward
            assert first is not None
            gated, reads = isinstance(first.f, Gated), side == "decoder"
            yield Rule(
                f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                f"{side}.layers.0.mixer.f.position.weight",
            )
            layer = (rule.prefixed(f"{side}.block.{{i}}.layer.", f"{side}.layers.{{i}}.") for rule in _layer(gated, reads))
            yield from expand(layer, len(stack.layers))
            yield Rule(f"{side}.final_layer_norm.weight", f"{side}.norm.weight")
        if not model.decoder.tied:
            yield Rule("lm_head.weight", "decoder.head.weight")

    def copies(self, model: Model) -> Mapping[str, str]:
        assert isinstance(model, EncoderDecoder)
        names = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
        return dict.fromkeys([*names, "lm_head.weight"] if model.decoder.tied else names, "shared.weight")


def _layer(gated: bool, reads: bool) -> Iterable[Rule]:
    """The rules of one block. The sublayers of theirs are numbered."""
    sublayers = [("SelfAttention", "mixer"), ("EncDecAttention", "cross")] if reads else [("SelfAttention", "mixer")]
    for number, (theirs, ours) in enumerate(sublayers):
        for part, name in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out")):
            yield Rule(f"{number}.{theirs}.{part}.weight", f"{ours}.f.{name}.weight")
        yield Rule(f"{number}.layer_norm.weight", f"{ours}.pre.weight")
    last = len(sublayers)
    inputs = (("wi_0", "gate"), ("wi_1", "up")) if gated else (("wi", "up"),)
    for theirs, ours in (*inputs, ("wo", "out")):
        yield Rule(f"{last}.DenseReluDense.{theirs}.weight", f"feedforward.f.{ours}.weight")
    yield Rule(f"{last}.layer_norm.weight", "feedforward.pre.weight")
