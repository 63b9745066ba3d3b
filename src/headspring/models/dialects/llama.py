"""The Llama line of `transformers`: Llama, Mistral, Qwen2, Qwen3 and Phi-3, as one table of names and a few differences.

| family | biases | QK-norm | tensors | windows |
| --- | --- | --- | --- | --- |
| Llama (arXiv 2302.13971) | all or none | no | one a matrix | none |
| Mistral (2310.06825) | no | no | one a matrix | one for all layers |
| Qwen2 (2407.10671) | q, k, v | no | one a matrix | from a layer on, or layer by layer |
| Qwen3 (2505.09388) | attention's or none | per head, before the rotation | one a matrix | as Qwen2 |
| Phi-3 (2404.14219) | no | no | q, k, v fused; gate and up fused | one for all layers |

All rotate the halves (c, c + C/2) of a head, as `RoPE` does: nothing is permuted. (Meta's own Llama files pair neighbours;
`transformers` permutes them when it converts, and those are the files that are read here.)
"""

from collections.abc import Iterable
from typing import Any

from headspring.artifacts.errors import UserError
from headspring.models.block import Block
from headspring.models.decoder import Decoder
from headspring.models.dialects.llama_line import (
    DOWN,
    NORMS,
    OUTPUT,
    LlamaLine,
    OneWindow,
    WindowByLayer,
    layer,
)
from headspring.models.dialects.registry import dialect
from headspring.models.dialects.rules import Rule
from headspring.models.feedforward import SwiGLU
from headspring.models.model import Model


@dialect
class Llama(LlamaLine):
    architecture, model_type = "LlamaForCausalLM", "llama"
    defaults = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
    fixed = {"hidden_act": "silu"}

    def config(self, model: Model) -> dict[str, Any]:
        said = super().config(model)
        if model.width % said["num_attention_heads"]:  # its config class refuses that, though a head_dim is given
            raise UserError(f"width ({model.width}) is no multiple of heads ({said['num_attention_heads']})")
        attention = self.first(model, SwiGLU)[1]
        return {**said, "attention_bias": attention.bias and attention.out_bias}

    def feedforward_config(self, model: Decoder) -> dict[str, Any]:
        return {**super().feedforward_config(model), "mlp_bias": self.first(model, SwiGLU)[2].bias}


@dialect
class Qwen2(WindowByLayer):
    architecture, model_type = "Qwen2ForCausalLM", "qwen2"
    bias = True
    defaults = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "num_key_value_heads": 32, "sliding_window": 4096}
    fixed = {"hidden_act": "silu", "attention_bias": False}


@dialect
class Qwen3(WindowByLayer):
    architecture, model_type = "Qwen3ForCausalLM", "qwen3"
    qk_norm = True
    defaults = Qwen2.defaults | {"head_dim": 128}
    fixed = {"hidden_act": "silu"}

    def config(self, model: Model) -> dict[str, Any]:
        said = super().config(model)
        attention = self.first(model, SwiGLU)[1]
        return {**said, "attention_bias": attention.bias and attention.out_bias}


@dialect
class Mistral(OneWindow):
    architecture, model_type = "MistralForCausalLM", "mistral"
    defaults = {"max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096}
    fixed = {"hidden_act": "silu"}


@dialect
class Phi3(OneWindow):
    architecture, model_type = "Phi3ForCausalLM", "phi3"
    fraction = 1.0
    defaults = {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    fixed = {"hidden_act": "silu"}

    def table(self, block: Block) -> Iterable[Rule]:
        return (
            *NORMS,
            layer("self_attn.qkv_proj.weight", *(f"mixer.f.{x}.weight" for x in "qkv")),
            *OUTPUT,
            layer("mlp.gate_up_proj.weight", "feedforward.f.gate.weight", "feedforward.f.up.weight"),
            *DOWN,
        )
