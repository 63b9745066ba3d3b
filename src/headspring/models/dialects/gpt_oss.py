"""GPT-OSS (arXiv 2508.10925): experts with a bounded gate, a learned sink in each head's softmax, windows every second layer.

Its experts are stacked in files, too, but lie (inputs, outputs), with the columns of gate and up in turns. Files on the hub
hold the experts in a four-bit format (MXFP4) and are refused for it: take one that was saved in bfloat16.
"""

from collections.abc import Iterable
from typing import Any

from headspring.models.attention import Attention
from headspring.models.block import Block
from headspring.models.decoder import Decoder
from headspring.models.dialects.decoders import FULL, SLIDING, read_layer_types
from headspring.models.dialects.llama_line import LlamaLine, layer
from headspring.models.dialects.mixtures import mixture_of
from headspring.models.dialects.moves import Alternating, Transposed, then
from headspring.models.dialects.registry import Settings, dialect
from headspring.models.dialects.rules import Rule
from headspring.models.feedforward import FeedForward
from headspring.models.model import Model
from headspring.models.moe import Clamp, MoE
from headspring.models.routing import SoftmaxRouter

ROTATION = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


@dialect
class GptOss(LlamaLine):
    architecture, model_type = "GptOssForCausalLM", "gpt_oss"
    theta = 150_000.0
    aliases = {"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"}
    defaults = {
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "attention_bias": True,
        "swiglu_limit": 7.0,
        "swiglu_alpha": 1.702,
        "rope_parameters": ROTATION,
    }
    fixed = {"hidden_act": "silu"}

    def windows(self, config: Settings) -> list[int | None]:
        types = read_layer_types(config, [FULL if i % 2 else SLIDING for i in range(config.count("num_hidden_layers"))])
        return [config["sliding_window"] if kind == SLIDING else None for kind in types]

    def attention(self, config: Settings, window: int | None) -> Attention:
        return super().attention(config, window).model_copy(update={"sink": True})

    def feedforward(self, config: Settings, index: int) -> FeedForward:
        return MoE(
            experts=config.count("num_local_experts"),
            top=config["num_experts_per_tok"],
            hidden=config["intermediate_size"],
            router=SoftmaxRouter(bias=True),
            bias=True,
            clamp=Clamp(limit=config["swiglu_limit"], alpha=config["swiglu_alpha"]),
        )

    def config(self, model: Model) -> dict[str, Any]:
        attention = self.first(model, FeedForward)[1]
        return {**super().config(model), "attention_bias": attention.bias and attention.out_bias}

    def windows_config(self, windows: list[int | None]) -> dict[str, Any]:
        sizes = [window for window in windows if window is not None]
        types = [FULL if window is None else SLIDING for window in windows]
        return {"sliding_window": sizes[0] if sizes else 128, "layer_types": types}

    def feedforward_config(self, model: Decoder) -> dict[str, Any]:
        mixture = mixture_of(self, model)
        clamp = self.part(mixture.clamp, Clamp, "layers.0.feedforward.f.clamp")
        return {
            "num_local_experts": mixture.experts,
            "num_experts_per_tok": mixture.top,
            "intermediate_size": mixture.hidden,
            "swiglu_limit": clamp.limit,
            "swiglu_alpha": clamp.alpha,
        }

    def table(self, block: Block) -> Iterable[Rule]:
        return (*super().table(block), layer("self_attn.sinks", "mixer.f.sinks"))

    def feedforward_table(self, block: Block) -> Iterable[Rule]:
        experts, both = "feedforward.f.experts.", ("gate", "up")
        yield layer("mlp.router.weight", "feedforward.f.router.weight")
        yield layer("mlp.router.bias", "feedforward.f.router.bias")
        turns = Alternating(axis=1)
        yield layer("mlp.experts.gate_up_proj", *(experts + x for x in both), move=then(turns, Transposed()))
        yield layer("mlp.experts.gate_up_proj_bias", *(f"{experts}{x}_bias" for x in both), move=turns)
        yield layer("mlp.experts.down_proj", experts + "out", move=Transposed())
        yield layer("mlp.experts.down_proj_bias", experts + "out_bias")
