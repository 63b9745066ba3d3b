"""BLOOM (arXiv 2211.05100): no rotation but ALiBi, a norm on the embeddings, q, k and v in one matrix, head by head.

It adds slope · key position to the scores and we subtract slope · distance: the same under a softmax, whatever the query.
"""

from collections.abc import Iterable
from typing import Any

from headspring.models.attention import Attention
from headspring.models.block import Block, Branch, repeat
from headspring.models.decoder import Decoder
from headspring.models.dialects.decoders import DecoderDialect, both, layer_rule
from headspring.models.dialects.moves import Grouped
from headspring.models.dialects.registry import Settings, dialect
from headspring.models.dialects.rules import Rule
from headspring.models.embedding import Embed
from headspring.models.feedforward import MLP
from headspring.models.model import Model
from headspring.models.norm import LayerNorm
from headspring.models.position import ALiBi

LAYER = "transformer.h.{i}."


@dialect
class Bloom(DecoderDialect):
    architecture, model_type = "BloomForCausalLM", "bloom"
    prefix = "transformer."
    aliases = {"n_embed": "hidden_size", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
    defaults = {"layer_norm_epsilon": 1e-5, "seq_length": 2048, "tie_word_embeddings": True}
    fixed = {"apply_residual_connection_post_layernorm": False}
    embedding = "transformer.word_embeddings.weight"
    ends = tuple(
        Rule(f"transformer.{theirs}.{kind}", f"{ours}.{kind}")
        for theirs, ours in (("word_embeddings_layernorm", "embed.norm"), ("ln_f", "norm"))
        for kind in ("weight", "bias")
    )

    def model(self, config: Settings) -> Decoder:
        """A config says nothing of a longest sequence, which ALiBi does not have; `seq_length` is that of training."""
        norm, width = LayerNorm(epsilon=config["layer_norm_epsilon"]), config["hidden_size"]
        attention = Attention(heads=config["n_head"], position=ALiBi(), qk_norm=None, bias=True, out_bias=True)
        feedforward = MLP(hidden=4 * width, activation="gelu_tanh", bias=True)
        block = Block(mixer=Branch(f=attention, pre=norm), feedforward=Branch(f=feedforward, pre=norm))
        return Decoder(
            vocab=config["vocab_size"],
            width=width,
            layers=repeat(config.count("n_layer"), block),
            context=config["seq_length"],
            norm=norm,
            tied=config["tie_word_embeddings"],
            embed=Embed(norm=norm),
        )

    def config(self, model: Model) -> dict[str, Any]:
        decoder, attention, _ = self.first(model, MLP)
        return {
            "vocab_size": decoder.vocab,
            "hidden_size": decoder.width,
            "n_layer": len(decoder.layers),
            "n_head": attention.heads,
            "seq_length": decoder.context,
            "layer_norm_epsilon": self.part(decoder.norm, LayerNorm, "norm").epsilon,
            "tie_word_embeddings": decoder.tied,
            "use_cache": True,
        }

    def table(self, block: Block) -> Iterable[Rule]:
        attention = block.mixer.f
        assert isinstance(attention, Attention)
        for kind in ("weight", "bias"):
            fused = (f"{LAYER}self_attention.query_key_value.{kind}", *(f"mixer.f.{x}.{kind}" for x in "qkv"))
            yield layer_rule(*fused, move=Grouped(attention.heads))
        yield from both(LAYER + "self_attention.dense", "mixer.f.out")
        yield from both(LAYER + "mlp.dense_h_to_4h", "feedforward.f.up")
        yield from both(LAYER + "mlp.dense_4h_to_h", "feedforward.f.out")
        yield from both(LAYER + "input_layernorm", "mixer.pre")
        yield from both(LAYER + "post_attention_layernorm", "feedforward.pre")
