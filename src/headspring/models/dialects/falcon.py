"""Falcon (arXiv 2311.16867), in its three layouts of q, k and v in one matrix.

| model | key–value heads | rows | branches and norms |
| --- | --- | --- | --- |
| Falcon-RW-1B | one a query head | head by head: q, k, v | one after the other, a norm each; ALiBi, biases |
| Falcon-7B | 1 | all queries, the key, the value | at once, behind one norm |
| Falcon-40B ("new architecture") | some | group by group: its queries, its key, its value | at once, a norm each or one |

All three are groups of rows, as many as there are key–value heads. ALiBi's bias is scaled with the scores there.
"""

from collections.abc import Iterable
from typing import Any

from headspring.artifacts.errors import UserError
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
from headspring.models.position import ALiBi, Position, RoPE

LAYER = "transformer.h.{i}."


@dialect
class Falcon(DecoderDialect):
    architecture, model_type = "FalconForCausalLM", "falcon"
    prefix = "transformer."
    aliases = {
        "n_embed": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_head_kv": "num_kv_heads",
    }
    defaults = {
        "max_position_embeddings": 2048,
        "layer_norm_epsilon": 1e-5,
        "activation": "gelu",
        "alibi": False,
        "new_decoder_architecture": False,
        "multi_query": True,
        "parallel_attn": True,
        "bias": False,
        "tie_word_embeddings": True,
    }
    embedding = "transformer.word_embeddings.weight"
    ends = (Rule("transformer.ln_f.weight", "norm.weight"), Rule("transformer.ln_f.bias", "norm.bias"))

    def model(self, config: Settings) -> Decoder:
        heads, width, bias = config["num_attention_heads"], config["hidden_size"], config["bias"]
        position, norm = self._position(config), LayerNorm(epsilon=config["layer_norm_epsilon"])
        kv_heads = heads if config.get("num_kv_heads") is None else config["num_kv_heads"]
        if not config["new_decoder_architecture"]:
            kv_heads = 1 if config["multi_query"] else heads
        attention = Attention(
            heads=heads,
            kv_heads=None if kv_heads == heads else kv_heads,
            position=position,
            qk_norm=None,
            bias=bias,
            out_bias=bias,
        )
        hidden = config.get("ffn_hidden_size") or 4 * width
        feedforward = MLP(hidden=hidden, activation=read_activation(config, "activation"), bias=bias)
        block = self._block(attention, feedforward, norm, config)
        return Decoder(
            vocab=config["vocab_size"],
            width=width,
            layers=repeat(config.count("num_hidden_layers"), block),
            context=read_context(config, position) if isinstance(position, RoPE) else config["max_position_embeddings"],
            norm=norm,
            tied=config["tie_word_embeddings"],
        )

    def _position(self, config: Settings) -> Position:
        if config["alibi"]:
            return ALiBi(scale=(config["hidden_size"] // config["num_attention_heads"]) ** -0.5)
        return read_rope(config)

    def _block(self, attention: Attention, feedforward: MLP, norm: LayerNorm, config: Settings) -> Block:
        new, norms = config["new_decoder_architecture"], config.get("num_ln_in_parallel_attn")
        if new and not config["parallel_attn"]:
            raise UserError("config.json: new_decoder_architecture is parallel: parallel_attn = false is not supported with it")
        if norms == 2 and not new:
            raise UserError("config.json: num_ln_in_parallel_attn = 2 belongs to new_decoder_architecture = true")
        if config["parallel_attn"] and not (new and norms in (None, 2)):
            mixer, rest = Branch(f=attention, pre=None), Branch(f=feedforward, pre=None)
            return Block(mixer=mixer, feedforward=rest, parallel=True, pre=norm)
        own = Branch(f=attention, pre=norm), Branch(f=feedforward, pre=norm)
        return Block(mixer=own[0], feedforward=own[1], parallel=config["parallel_attn"])

    def config(self, model: Model) -> dict[str, Any]:
        decoder, attention, feedforward = self.first(model, MLP)
        block, heads = decoder.layers[0], attention.heads
        kv_heads, two = attention.kv_heads or heads, block.pre is None
        new = block.parallel and (two or kv_heads not in (1, heads))
        return {
            **write_rope(attention.position, decoder.context),
            "vocab_size": decoder.vocab,
            "hidden_size": decoder.width,
            "num_hidden_layers": len(decoder.layers),
            "num_attention_heads": heads,
            "num_kv_heads": kv_heads,
            "ffn_hidden_size": feedforward.hidden,
            "activation": write_activation(feedforward.activation),
            "layer_norm_epsilon": self.part(decoder.norm, LayerNorm, "norm").epsilon,
            "alibi": isinstance(attention.position, ALiBi),
            "new_decoder_architecture": new,
            "num_ln_in_parallel_attn": (2 if two else 1) if new else None,
            "multi_query": kv_heads == 1,
            "parallel_attn": block.parallel,
            "bias": attention.bias,
            "tie_word_embeddings": decoder.tied,
            "use_cache": True,
        }

    def table(self, block: Block) -> Iterable[Rule]:
        attention = block.mixer.f
        assert isinstance(attention, Attention)
        for kind in ("weight", "bias") if attention.bias else ("weight",):
            fused = (f"{LAYER}self_attention.query_key_value.{kind}", *(f"mixer.f.{x}.{kind}" for x in "qkv"))
            yield layer_rule(*fused, move=Grouped(attention.kv_heads or attention.heads))
        yield from both(LAYER + "self_attention.dense", "mixer.f.out", attention.bias)
        yield from both(LAYER + "mlp.dense_h_to_4h", "feedforward.f.up", attention.bias)
        yield from both(LAYER + "mlp.dense_4h_to_h", "feedforward.f.out", attention.bias)
        if block.pre is not None:
            yield from both(LAYER + "input_layernorm", "pre")
        elif block.parallel:
            yield from both(LAYER + "ln_attn", "mixer.pre")
            yield from both(LAYER + "ln_mlp", "feedforward.pre")
        else:
            yield from both(LAYER + "input_layernorm", "mixer.pre")
            yield from both(LAYER + "post_attention_layernorm", "feedforward.pre")
