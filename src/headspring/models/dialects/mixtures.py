"""Mixtures of experts on Llama's line: Mixtral (arXiv 2401.04088) and Qwen3-MoE (2505.09388).

Files have a tensor for each expert and matrix; ours are stacked, a tensor for each matrix. Mixtral calls gate, up and down
w1, w3 and w2. What transformers 5 stacks in memory it writes expert by expert, so that old and new files are alike.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from headspring.models.block import Block, Branch
from headspring.models.decoder import Decoder
from headspring.models.dialects.llama_line import LlamaLine, OneWindow, WindowByLayer, layer
from headspring.models.dialects.moves import Stacked
from headspring.models.dialects.registry import Settings, dialect
from headspring.models.dialects.rules import Rule
from headspring.models.feedforward import FeedForward, SwiGLU
from headspring.models.model import Model
from headspring.models.moe import MoE
from headspring.models.routing import SoftmaxRouter


def expert_rules(experts: int, place: str, names: Mapping[str, str]) -> Iterable[Rule]:
    """One rule for each matrix of ours: `names` maps it to theirs."""
    for ours, theirs in names.items():
        tensors = [f"model.layers.{{i}}.{place}.experts.{expert}.{theirs}.weight" for expert in range(experts)]
        yield Rule(tensors, f"layers.{{i}}.feedforward.f.experts.{ours}", move=Stacked())


def mixture_of(self: LlamaLine, model: Decoder) -> MoE:
    """The first layer's mixture. Raises `UserError` where no layer has one."""
    found = (block.feedforward.f for block in model.layers if block.feedforward is not None)
    mixture = next((part for part in found if isinstance(part, MoE)), None)
    return self.part(mixture, MoE, "a layer's feedforward.f")


@dialect
class Mixtral(OneWindow):
    architecture, model_type = "MixtralForCausalLM", "mixtral"
    theta = 1e6
    defaults = {
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    fixed = {"hidden_act": "silu"}

    def feedforward(self, config: Settings, index: int) -> FeedForward:
        experts, top = config.count("num_local_experts"), config["num_experts_per_tok"]
        return MoE(experts=experts, top=top, hidden=config["intermediate_size"])

    def feedforward_config(self, model: Decoder) -> dict[str, Any]:
        mixture = mixture_of(self, model)
        return {
            "num_local_experts": mixture.experts,
            "num_experts_per_tok": mixture.top,
            "intermediate_size": mixture.hidden,
        }

    def feedforward_table(self, block: Block) -> Iterable[Rule]:
        assert block.feedforward is not None and isinstance(block.feedforward.f, MoE)
        yield layer("block_sparse_moe.gate.weight", "feedforward.f.router.weight")
        names = {"gate": "w1", "up": "w3", "out": "w2"}
        yield from expert_rules(block.feedforward.f.experts, "block_sparse_moe", names)


@dialect
class Qwen3MoE(WindowByLayer):
    architecture, model_type = "Qwen3MoeForCausalLM", "qwen3_moe"
    qk_norm = True
    aliases = {"num_local_experts": "num_experts"}
    defaults = {
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
        "norm_topk_prob": False,
        "sliding_window": 4096,
        "intermediate_size": 6144,
        "max_window_layers": 0,
    }
    fixed = {"hidden_act": "silu"}

    def feedforward(self, config: Settings, index: int) -> FeedForward:
        sparse = index not in (config.get("mlp_only_layers") or ()) and (index + 1) % config["decoder_sparse_step"] == 0
        if not sparse or not config.count("num_experts"):
            return SwiGLU(hidden=config["intermediate_size"])
        return MoE(
            experts=config["num_experts"],
            top=config["num_experts_per_tok"],
            hidden=config["moe_intermediate_size"],
            router=SoftmaxRouter(renormalise=config["norm_topk_prob"]),
        )

    def windows_config(self, windows: list[int | None]) -> dict[str, Any]:
        """Its config class has one window for all layers, or none."""
        said = super().windows_config(windows)
        return {key: said[key] for key in ("sliding_window", "use_sliding_window")} | {"max_window_layers": 0}

    def config(self, model: Model) -> dict[str, Any]:
        attention = self.first(model, FeedForward)[1]
        return {**super().config(model), "attention_bias": attention.bias and attention.out_bias}

    def feedforward_config(self, model: Decoder) -> dict[str, Any]:
        mixture, dense = mixture_of(self, model), [i for i, block in enumerate(model.layers) if _dense(block)]
        router = self.part(mixture.router, SoftmaxRouter, "a layer's feedforward.f.router")
        widths = [block.feedforward.f.hidden for block in model.layers if _dense(block)]  # type: ignore[union-attr]
        return {
            "num_experts": mixture.experts,
            "num_experts_per_tok": mixture.top,
            "moe_intermediate_size": mixture.hidden,
            "intermediate_size": widths[0] if widths else mixture.hidden * mixture.top,
            "norm_topk_prob": router.renormalise,
            "decoder_sparse_step": 1,
            "mlp_only_layers": dense,
        }

    def feedforward_table(self, block: Block) -> Iterable[Rule]:
        if _dense(block):
            return super().feedforward_table(block)
        assert block.feedforward is not None and isinstance(block.feedforward.f, MoE)
        names = {"gate": "gate_proj", "up": "up_proj", "out": "down_proj"}
        router = layer("mlp.gate.weight", "feedforward.f.router.weight")
        return (router, *expert_rules(block.feedforward.f.experts, "mlp", names))


def _dense(block: Block) -> bool:
    return isinstance(block.feedforward, Branch) and isinstance(block.feedforward.f, SwiGLU)
