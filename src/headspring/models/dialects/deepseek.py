"""DeepSeek-V3 (arXiv 2412.19437): keys and values from a latent (MLA), and many small experts beside a shared one.

| theirs | ours |
| --- | --- |
| `q_proj`, `q_b_proj` | head by head [unrotated; rotated], the rotated channels as neighbours (2c, 2c + 1), ours as halves |
| `kv_a_proj_with_mqa` | the latent, then the rotary key that all heads share, as neighbours |
| `kv_b_proj` | head by head [key; value] |
| `e_score_correction_bias` | what balancing adds to the choice of experts |

The norms on the latents have their own epsilon, 1e-6. The module that predicts the token after next, which stands in files
behind the last layer, is left out, as `transformers` leaves it.
"""

from collections.abc import Iterable
from typing import Any

from headspring.artifacts.errors import UserError
from headspring.models.block import Block, Branch
from headspring.models.decoder import Decoder
from headspring.models.dialects.llama_line import NORMS, OUTPUT, OUTPUT_BIAS, LlamaLine, layer
from headspring.models.dialects.mixtures import expert_rules, mixture_of
from headspring.models.dialects.moves import Grouped, Move, Pairs, Rows, Shape, Tensors
from headspring.models.dialects.registry import Settings, dialect
from headspring.models.dialects.rotary import read_rope, write_rope
from headspring.models.dialects.rules import Rule
from headspring.models.feedforward import FeedForward, SwiGLU
from headspring.models.mask import Causal
from headspring.models.mla import MLA
from headspring.models.model import Model
from headspring.models.moe import MoE
from headspring.models.norm import RMSNorm
from headspring.models.routing import SigmoidRouter

INNER_EPSILON = 1e-6
EXPERTS = {"gate": "gate_proj", "up": "up_proj", "out": "down_proj"}


class LatentAndKey:
    """The rows of the latent, then those of the rotary key, whose pairs become neighbours."""

    def out(self, ours: Tensors) -> Tensors:
        return Rows().out([ours[0], *Pairs(1).out(ours[1:])])

    def back(self, theirs: Tensors, shapes: list[Shape]) -> Tensors:
        latent, key = Rows().back(theirs, shapes)
        return [latent, *Pairs(1).back([key], shapes[1:])]


@dialect
class DeepSeekV3(LlamaLine):
    architecture, model_type = "DeepseekV3ForCausalLM", "deepseek_v3"
    aliases = {"num_local_experts": "n_routed_experts"}
    defaults = {
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 128,
        "moe_intermediate_size": 2048,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "routed_scaling_factor": 2.5,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
        "attention_bias": False,
    }
    fixed = {
        "hidden_act": "silu",
        "rope_interleave": True,
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }

    def block(self, config: Settings, index: int, window: int | None) -> Block:
        norm, inner = self.norm(config), RMSNorm(epsilon=INNER_EPSILON)
        if config["num_key_value_heads"] != config["num_attention_heads"]:
            raise UserError("config.json: num_key_value_heads must be num_attention_heads: latent attention has no groups")
        attention = MLA(
            heads=config["num_attention_heads"],
            head_dim=config["qk_nope_head_dim"],
            rotary_dim=config["qk_rope_head_dim"],
            value_dim=None if config["v_head_dim"] == config["qk_nope_head_dim"] else config["v_head_dim"],
            latent=config["kv_lora_rank"],
            query_latent=config["q_lora_rank"],
            position=read_rope(config),
            mask=Causal(window=window),
            norm=inner,
            bias=config["attention_bias"],
        )
        return Block(mixer=Branch(f=attention, pre=norm), feedforward=Branch(f=self.feedforward(config, index), pre=norm))

    def feedforward(self, config: Settings, index: int) -> FeedForward:
        if index < config["first_k_dense_replace"]:
            return SwiGLU(hidden=config["intermediate_size"])
        router = SigmoidRouter(
            renormalise=config["norm_topk_prob"],
            scale=config["routed_scaling_factor"],
            groups=config["n_group"],
            top_groups=config["topk_group"],
        )
        return MoE(
            experts=config.count("n_routed_experts"),
            top=config["num_experts_per_tok"],
            hidden=config["moe_intermediate_size"],
            shared=config["moe_intermediate_size"] * config["n_shared_experts"],
            router=router,
        )

    def config(self, model: Model) -> dict[str, Any]:
        decoder = self.part(model, Decoder, "the model")
        attention = self.part(decoder.layers[0].mixer.f, MLA, "layers.0.mixer.f")
        return {
            "vocab_size": decoder.vocab,
            "hidden_size": decoder.width,
            "num_hidden_layers": len(decoder.layers),
            "num_attention_heads": attention.heads,
            "num_key_value_heads": attention.heads,
            "qk_nope_head_dim": attention.head_dim,
            "qk_rope_head_dim": attention.rotary_dim,
            "v_head_dim": attention.value_dim or attention.head_dim,
            "kv_lora_rank": attention.latent,
            "q_lora_rank": attention.query_latent,
            "attention_bias": attention.bias,
            "rms_norm_eps": self.part(decoder.norm, RMSNorm, "norm").epsilon,
            "tie_word_embeddings": decoder.tied,
            "use_cache": True,
            **write_rope(attention.position, decoder.context),
            **self.feedforward_config(decoder),
        }

    def feedforward_config(self, model: Decoder) -> dict[str, Any]:
        """How many layers at the start are dense is counted; any other order is found by reading this back."""
        mixture = mixture_of(self, model)
        router = self.part(mixture.router, SigmoidRouter, "a layer's feedforward.f.router")
        parts = [block.feedforward.f for block in model.layers if block.feedforward is not None]
        dense = [part.hidden for part in parts if isinstance(part, SwiGLU)]
        return {
            "intermediate_size": dense[0] if dense else mixture.hidden,
            "first_k_dense_replace": len(dense),
            "moe_intermediate_size": mixture.hidden,
            "n_routed_experts": mixture.experts,
            "num_experts_per_tok": mixture.top,
            "n_shared_experts": max(1, (mixture.shared or 0) // mixture.hidden),
            "norm_topk_prob": router.renormalise,
            "routed_scaling_factor": router.scale,
            "n_group": router.groups,
            "topk_group": router.top_groups,
        }

    def left_out(self, model: Model) -> tuple[str, ...]:
        assert isinstance(model, Decoder)
        return (*super().left_out(model), f"model.layers.{len(model.layers)}.*")

    def table(self, block: Block) -> Iterable[Rule]:
        attention = block.mixer.f
        assert isinstance(attention, MLA)
        yield from (*NORMS, *OUTPUT, *self.feedforward_table(block))
        queries: Move = Pairs(attention.heads, rotated=attention.rotary_dim, skipped=attention.head_dim)
        if attention.query_latent is None:
            yield layer("self_attn.q_proj.weight", "mixer.f.q.weight", move=queries)
        else:
            yield layer("self_attn.q_a_proj.weight", "mixer.f.q_down.weight")
            yield layer("self_attn.q_a_layernorm.weight", "mixer.f.q_norm.weight")
            yield layer("self_attn.q_b_proj.weight", "mixer.f.q_up.weight", move=queries)
        for kind in ("weight", "bias") if attention.bias else ("weight",):
            parts = (f"mixer.f.kv_down.{kind}", f"mixer.f.k_rotary.{kind}")
            yield layer(f"self_attn.kv_a_proj_with_mqa.{kind}", *parts, move=LatentAndKey())
        if attention.bias:
            yield from OUTPUT_BIAS
            if attention.query_latent is not None:
                yield layer("self_attn.q_a_proj.bias", "mixer.f.q_down.bias")
        yield layer("self_attn.kv_a_layernorm.weight", "mixer.f.kv_norm.weight")
        up = ("mixer.f.k_up.weight", "mixer.f.v_up.weight")
        yield layer("self_attn.kv_b_proj.weight", *up, move=Grouped(attention.heads))

    def feedforward_table(self, block: Block) -> Iterable[Rule]:
        assert block.feedforward is not None
        mixture = block.feedforward.f
        if not isinstance(mixture, MoE):
            yield from super().feedforward_table(block)
            return
        yield layer("mlp.gate.weight", "feedforward.f.router.weight")
        yield layer("mlp.gate.e_score_correction_bias", "feedforward.f.router.correction")
        yield from expert_rules(mixture.experts, "mlp", EXPERTS)
        for ours, theirs in EXPERTS.items():
            yield layer(f"mlp.shared_experts.{theirs}.weight", f"feedforward.f.shared.{ours}.weight")
