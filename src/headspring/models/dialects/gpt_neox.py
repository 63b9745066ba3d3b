"""GPT-NeoX (arXiv 2204.06745) and Pythia (2304.01373): both branches read the stream at once, a quarter of each head rotates.

q, k and v are one matrix whose rows go head by head: the first head's query, key and value, then the second's.
"""

from collections.abc import Iterable
from typing import Any

from headspring.models.attention import Attention
from headspring.models.block import Block, Branch, repeat
from headspring.models.decoder import Decoder
from headspring.models.dialects.decoders import DecoderDialect, both, layer_rule, read_activation, write_activation
from headspring.models.dialects.moves import Grouped
from headspring.models.dialects.registry import Settings, dialect
from headspring.models.dialects.rotary import read_context, read_rope, write_rope
from headspring.models.dialects.rules import Rule
from headspring.models.feedforward import MLP
from headspring.models.model import Model
from headspring.models.norm import LayerNorm
from headspring.models.position import RoPE

LAYER = "gpt_neox.layers.{i}."
QUARTER = 0.25


@dialect
class GPTNeoX(DecoderDialect):
    architecture, model_type = "GPTNeoXForCausalLM", "gpt_neox"
    prefix = "gpt_neox."
    aliases = {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"}
    ignored = ("*.attention.bias", "*.attention.masked_bias", "*.rotary_emb.inv_freq")
    defaults = {
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
        "attention_bias": True,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
    }
    embedding, head = "gpt_neox.embed_in.weight", "embed_out.weight"
    ends = (
        Rule("gpt_neox.final_layer_norm.weight", "norm.weight"),
        Rule("gpt_neox.final_layer_norm.bias", "norm.bias"),
    )

    def model(self, config: Settings) -> Decoder:
        norm, rope = LayerNorm(epsilon=config["layer_norm_eps"]), read_rope(config, fraction=QUARTER)
        bias = config["attention_bias"]
        attention = Attention(heads=config["num_attention_heads"], position=rope, qk_norm=None, bias=bias, out_bias=bias)
        feedforward = MLP(hidden=config["intermediate_size"], activation=read_activation(config, "hidden_act"), bias=True)
        block = Block(
            mixer=Branch(f=attention, pre=norm),
            feedforward=Branch(f=feedforward, pre=norm),
            parallel=config["use_parallel_residual"],
        )
        return Decoder(
            vocab=config["vocab_size"],
            width=config["hidden_size"],
            layers=repeat(config.count("num_hidden_layers"), block),
            context=read_context(config, rope),
            norm=norm,
            tied=config["tie_word_embeddings"],
        )

    def config(self, model: Model) -> dict[str, Any]:
        decoder, attention, feedforward = self.first(model, MLP)
        rope = self.part(attention.position, RoPE, "layers.0.mixer.f.position")
        said = write_rope(rope, decoder.context)
        said["rope_parameters"]["partial_rotary_factor"] = rope.fraction  # left out, it would be a quarter here
        return {
            **said,
            "rotary_pct": rope.fraction,
            "rotary_emb_base": rope.theta,
            "vocab_size": decoder.vocab,
            "hidden_size": decoder.width,
            "num_hidden_layers": len(decoder.layers),
            "num_attention_heads": attention.heads,
            "intermediate_size": feedforward.hidden,
            "hidden_act": write_activation(feedforward.activation),
            "layer_norm_eps": self.part(decoder.norm, LayerNorm, "norm").epsilon,
            "attention_bias": attention.bias,
            "use_parallel_residual": decoder.layers[0].parallel,
            "tie_word_embeddings": decoder.tied,
            "use_cache": True,
        }

    def table(self, block: Block) -> Iterable[Rule]:
        attention = block.mixer.f
        assert isinstance(attention, Attention)
        for kind in ("weight", "bias") if attention.bias else ("weight",):
            fused = (f"{LAYER}attention.query_key_value.{kind}", *(f"mixer.f.{x}.{kind}" for x in "qkv"))
            yield layer_rule(*fused, move=Grouped(attention.heads))
        yield from both(LAYER + "attention.dense", "mixer.f.out", attention.out_bias)
        yield from both(LAYER + "mlp.dense_h_to_4h", "feedforward.f.up")
        yield from both(LAYER + "mlp.dense_4h_to_h", "feedforward.f.out")
        yield from both(LAYER + "input_layernorm", "mixer.pre")
        yield from both(LAYER + "post_attention_layernorm", "feedforward.pre")
