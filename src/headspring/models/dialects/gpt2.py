"""GPT-2 of `transformers`: learned positions, LayerNorm, biases everywhere, a GELU MLP.

Its matrices are written (inputs, outputs), the other way round than everywhere else, and q, k, v are one of them. Files on
the hub were saved from the bare model (no `transformer.` in front) and carry the causal mask of each layer, which is left.
"""

from collections.abc import Iterable
from typing import Any

from headspring.models.attention import Attention
from headspring.models.block import Block, Branch, repeat
from headspring.models.decoder import Decoder
from headspring.models.dialects.decoders import DecoderDialect, layer_rule, read_activation, write_activation
from headspring.models.dialects.moves import Rows, Transposed, then
from headspring.models.dialects.registry import Settings, dialect
from headspring.models.dialects.rules import Rule
from headspring.models.embedding import Embed
from headspring.models.feedforward import MLP
from headspring.models.model import Model
from headspring.models.norm import LayerNorm
from headspring.models.position import Learned, NoPE

LAYER = "transformer.h.{i}."
MATRICES = {"attn.c_proj": "mixer.f.out", "mlp.c_fc": "feedforward.f.up", "mlp.c_proj": "feedforward.f.out"}
NORMS = {"ln_1": "mixer.pre", "ln_2": "feedforward.pre"}


@dialect
class GPT2(DecoderDialect):
    architecture, model_type = "GPT2LMHeadModel", "gpt2"
    prefix = "transformer."
    ignored = ("*.attn.bias", "*.attn.masked_bias")
    defaults = {
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
    }
    fixed = {"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    embedding = "transformer.wte.weight"
    ends = (
        Rule("transformer.wpe.weight", "embed.positions.weight"),
        Rule("transformer.ln_f.weight", "norm.weight"),
        Rule("transformer.ln_f.bias", "norm.bias"),
    )

    def model(self, config: Settings) -> Decoder:
        norm, width = LayerNorm(epsilon=config["layer_norm_epsilon"]), config["n_embd"]
        scale = None if config["scale_attn_weights"] else 1.0
        attention = Attention(heads=config["n_head"], position=NoPE(), qk_norm=None, bias=True, out_bias=True, scale=scale)
        activation = read_activation(config, "activation_function")
        feedforward = MLP(hidden=config.get("n_inner") or 4 * width, activation=activation, bias=True)
        block = Block(mixer=Branch(f=attention, pre=norm), feedforward=Branch(f=feedforward, pre=norm))
        return Decoder(
            vocab=config["vocab_size"],
            width=width,
            layers=repeat(config.count("n_layer"), block),
            context=config["n_positions"],
            norm=norm,
            tied=config["tie_word_embeddings"],
            embed=Embed(positions=Learned()),
        )

    def config(self, model: Model) -> dict[str, Any]:
        decoder, attention, feedforward = self.first(model, MLP)
        return {
            "vocab_size": decoder.vocab,
            "n_positions": decoder.context,
            "n_ctx": decoder.context,
            "n_embd": decoder.width,
            "n_layer": len(decoder.layers),
            "n_head": attention.heads,
            "n_inner": feedforward.hidden,
            "activation_function": write_activation(feedforward.activation).replace("pytorch_tanh", "new"),
            "layer_norm_epsilon": self.part(decoder.norm, LayerNorm, "norm").epsilon,
            "scale_attn_weights": attention.scale != 1.0,
            "tie_word_embeddings": decoder.tied,
            "use_cache": True,
        }

    def table(self, block: Block) -> Iterable[Rule]:
        fused = (LAYER + "attn.c_attn.weight", *(f"mixer.f.{x}.weight" for x in "qkv"))
        yield layer_rule(*fused, move=then(Rows(), Transposed()))
        yield layer_rule(LAYER + "attn.c_attn.bias", *(f"mixer.f.{x}.bias" for x in "qkv"))
        for theirs, ours in MATRICES.items():
            yield layer_rule(f"{LAYER}{theirs}.weight", f"{ours}.weight", move=Transposed())
            yield layer_rule(f"{LAYER}{theirs}.bias", f"{ours}.bias")
        for theirs, ours in NORMS.items():
            yield layer_rule(f"{LAYER}{theirs}.weight", f"{ours}.weight")
            yield layer_rule(f"{LAYER}{theirs}.bias", f"{ours}.bias")
