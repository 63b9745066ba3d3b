"""OPT (arXiv 2205.01068): GPT-2's block with ReLU, and learned positions whose first two rows are leftovers.

Most sizes have the norm before a branch; the one of 350 million has it after, and embeddings narrower than the stream, with
a matrix in and out: that one has no place in `Embed` and is refused. `final_layer_norm` of a layer is the norm of its
feed-forward part; outside the layers it is the last norm.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from headspring.artifacts.errors import UserError
from headspring.models.attention import Attention
from headspring.models.block import Block, Branch, repeat
from headspring.models.decoder import Decoder
from headspring.models.dialects.decoders import DecoderDialect, both, read_activation, write_activation
from headspring.models.dialects.registry import Settings, dialect
from headspring.models.dialects.rules import Rule
from headspring.models.embedding import Embed
from headspring.models.feedforward import MLP
from headspring.models.model import Model
from headspring.models.norm import LayerNorm
from headspring.models.position import Learned, NoPE

LAYER = "model.decoder.layers.{i}."
LEFTOVERS = 2


@dialect
class OPT(DecoderDialect):
    architecture, model_type = "OPTForCausalLM", "opt"
    prefix = "model."
    defaults = {
        "max_position_embeddings": 2048,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": True,
    }
    embedding = "model.decoder.embed_tokens.weight"
    ends = (Rule("model.decoder.embed_positions.weight", "embed.positions.weight"),)

    def model(self, config: Settings) -> Decoder:
        width, narrow = config["hidden_size"], config.get("word_embed_proj_dim")
        if narrow not in (None, width):
            raise UserError(
                f"config.json: word_embed_proj_dim = {narrow} beside hidden_size = {width}: embeddings narrower than the "
                "stream (as in opt-350m) are not supported; take another size of OPT"
            )
        learned, bias = config["layer_norm_elementwise_affine"], config["enable_bias"]
        norm = LayerNorm(gain=learned, bias=learned)
        place = {"pre": norm} if config["do_layer_norm_before"] else {"pre": None, "out": norm}
        attention = Attention(heads=config["num_attention_heads"], position=NoPE(), qk_norm=None, bias=bias, out_bias=bias)
        feedforward = MLP(hidden=config["ffn_dim"], activation=read_activation(config, "activation_function"), bias=bias)
        block = Block(mixer=Branch(f=attention, **place), feedforward=Branch(f=feedforward, **place))
        last = config["do_layer_norm_before"] and not config["_remove_final_layer_norm"]
        return Decoder(
            vocab=config["vocab_size"],
            width=width,
            layers=repeat(config.count("num_hidden_layers"), block),
            context=config["max_position_embeddings"],
            norm=norm if last else None,
            tied=config["tie_word_embeddings"],
            embed=Embed(positions=Learned(offset=LEFTOVERS)),
        )

    def config(self, model: Model) -> dict[str, Any]:
        decoder, attention, feedforward = self.first(model, MLP)
        before = decoder.layers[0].mixer.pre is not None
        norm = decoder.layers[0].mixer.pre or decoder.layers[0].mixer.out
        return {
            "vocab_size": decoder.vocab,
            "hidden_size": decoder.width,
            "word_embed_proj_dim": decoder.width,
            "num_hidden_layers": len(decoder.layers),
            "num_attention_heads": attention.heads,
            "ffn_dim": feedforward.hidden,
            "max_position_embeddings": decoder.context,
            "activation_function": write_activation(feedforward.activation),
            "do_layer_norm_before": before,
            "_remove_final_layer_norm": before and decoder.norm is None,
            "enable_bias": attention.bias,
            "layer_norm_elementwise_affine": self.part(norm, LayerNorm, "layers.0.mixer.pre").gain,
            "tie_word_embeddings": decoder.tied,
            "use_cache": True,
        }

    def rules(self, model: Model) -> Iterator[Rule]:
        yield from super().rules(model)
        assert isinstance(model, Decoder)
        if isinstance(model.norm, LayerNorm) and model.norm.gain:
            yield from (Rule(f"model.decoder.final_layer_norm.{x}", f"norm.{x}") for x in ("weight", "bias"))

    def table(self, block: Block) -> Iterable[Rule]:
        attention, norm = block.mixer.f, block.mixer.pre or block.mixer.out
        assert isinstance(attention, Attention) and isinstance(norm, LayerNorm)
        slot = "pre" if block.mixer.pre else "out"
        for x, ours in {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "out"}.items():
            yield from both(f"{LAYER}self_attn.{x}", f"mixer.f.{ours}", attention.bias)
        yield from both(LAYER + "fc1", "feedforward.f.up", attention.bias)
        yield from both(LAYER + "fc2", "feedforward.f.out", attention.bias)
        if norm.gain:
            yield from both(LAYER + "self_attn_layer_norm", f"mixer.{slot}")
            yield from both(LAYER + "final_layer_norm", f"feedforward.{slot}")
