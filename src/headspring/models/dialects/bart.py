"""BART (arXiv 1910.13461): the original post-norm layout with learned positions and a norm over the embeddings.

Traps: positions begin at row 2 of their tables on both sides (the first two rows are leftovers), and the logits have a
bias that is a buffer of theirs, `final_logits_bias` (1, V), and a parameter of ours. mBART and Pegasus are pre-norm and have
names of their own.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from headspring.artifacts.errors import UserError
from headspring.models.attention import Attention
from headspring.models.block import Block, Branch, repeat
from headspring.models.cross_attention import CrossAttention
from headspring.models.decoder import Decoder
from headspring.models.dialects.bert import ACTIVATIONS, pairs
from headspring.models.dialects.moves import Reshaped
from headspring.models.dialects.registry import Dialect, Settings, dialect
from headspring.models.dialects.rules import Rule, expand
from headspring.models.embedding import Embed, Head
from headspring.models.encoder import Encoder
from headspring.models.encoder_decoder import EncoderDecoder
from headspring.models.feedforward import MLP
from headspring.models.mask import Causal, Full, Mask
from headspring.models.model import Model
from headspring.models.norm import LayerNorm
from headspring.models.position import Learned, NoPE

OFFSET = 2


@dialect
class Bart(Dialect):
    architecture, model_type = "BartForConditionalGeneration", "bart"
    defaults = {
        "activation_function": "gelu",
        "max_position_embeddings": 1024,
        "scale_embedding": False,
        "decoder_start_token_id": 2,
    }
    fixed = {"is_encoder_decoder": True, "tie_word_embeddings": True}

    def model(self, config: Settings) -> EncoderDecoder:
        scale = config["d_model"] ** 0.5 if config["scale_embedding"] else None
        embed = Embed(scale=scale, positions=Learned(offset=OFFSET), norm=LayerNorm())
        same = {
            "vocab": config["vocab_size"],
            "width": config["d_model"],
            "context": config["max_position_embeddings"],
            "norm": None,
            "embed": embed,
        }
        return EncoderDecoder(
            encoder=Encoder(**same, layers=self._layers(config, "encoder", Full()), head=None),
            decoder=Decoder(**same, layers=self._layers(config, "decoder", Causal()), head=Head(bias=True)),
            start=config["decoder_start_token_id"],
        )

    def _layers(self, config: Settings, side: str, mask: Mask) -> tuple[Block, ...]:
        name = config["activation_function"]
        if name not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise UserError(f"config.json: activation_function = {name!r} is not supported; those that are: {known}")
        same = {"heads": config[f"{side}_attention_heads"], "qk_norm": None, "bias": True, "out_bias": True}
        hidden = config[f"{side}_ffn_dim"]
        block = Block(
            mixer=_branch(Attention(position=NoPE(), mask=mask, **same)),
            cross=_branch(CrossAttention(**same)) if side == "decoder" else None,
            feedforward=_branch(MLP(hidden=hidden, activation=ACTIVATIONS[name], bias=True)),
        )
        return repeat(config.count(f"{side}_layers"), block)

    def config(self, model: Model) -> dict[str, Any]:
        """The first layer of each side speaks for all of it."""
        model = self.part(model, EncoderDecoder, "the model")
        names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
        sides: dict[str, Any] = {}
        for side, stack in (("encoder", model.encoder), ("decoder", model.decoder)):
            block, where = stack.layers[0], f"{side}.layers.0"
            branch = self.part(block.feedforward, Branch, f"{where}.feedforward")
            feedforward = self.part(branch.f, MLP, f"{where}.feedforward.f")
            if feedforward.activation not in names:
                raise UserError(f"{self.architecture} has no word for the activation {feedforward.activation!r}")
            sides |= {
                f"{side}_layers": len(stack.layers),
                f"{side}_attention_heads": self.part(block.mixer.f, Attention, f"{where}.mixer.f").heads,
                f"{side}_ffn_dim": feedforward.hidden,
                "activation_function": names[feedforward.activation],
            }
        return {
            "vocab_size": model.vocab,
            "d_model": model.width,
            "max_position_embeddings": model.context,
            "scale_embedding": model.decoder.embed.scale is not None,
            "decoder_start_token_id": model.start,
            **sides,
        }

    def rules(self, model: Model) -> Iterator[Rule]:
        assert isinstance(model, EncoderDecoder)
        yield Rule("model.shared.weight", "encoder.embed.weight")
        yield Rule("final_logits_bias", "decoder.head.bias", move=Reshaped((1, model.vocab)))
        for side, stack in (("encoder", model.encoder), ("decoder", model.decoder)):
            yield Rule(f"model.{side}.embed_positions.weight", f"{side}.embed.positions.weight")
            yield from pairs(f"model.{side}.layernorm_embedding", f"{side}.embed.norm")
            layer = (rule.prefixed(f"model.{side}.layers.{{i}}.", f"{side}.layers.{{i}}.") for rule in _layer(side))
            yield from expand(layer, len(stack.layers))

    def copies(self, model: Model) -> Mapping[str, str]:
        names = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight")
        return dict.fromkeys(names, "model.shared.weight")


def _branch(f: Attention | CrossAttention | MLP) -> Branch:
    return Branch(f=f, pre=None, out=LayerNorm())


def _layer(side: str) -> Iterator[Rule]:
    """The rules of one block."""
    attentions = [("self_attn", "mixer"), ("encoder_attn", "cross")] if side == "decoder" else [("self_attn", "mixer")]
    for theirs, ours in attentions:
        for part, name in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "out")):
            yield from pairs(f"{theirs}.{part}", f"{ours}.f.{name}")
        yield from pairs(f"{theirs}_layer_norm", f"{ours}.out")
    yield from pairs("fc1", "feedforward.f.up")
    yield from pairs("fc2", "feedforward.f.out")
    yield from pairs("final_layer_norm", "feedforward.out")
