"""Mixtures of experts and latent attention, as `transformers` computes them."""

import json

import pytest

from headspring.artifacts import UserError
from headspring.models.dialects import import_huggingface
from tests.models.parity import CONTEXT, check_causal, peer

# Sizes are multiples of 8: the grouped products of the reference want strides of 16 bytes.
SMALL = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "num_experts_per_tok": 2,
}
QWEN = SMALL | {"num_local_experts": 5, "moe_intermediate_size": 16, "head_dim": 8}
OSS = SMALL | {
    "num_local_experts": 5,
    "head_dim": 8,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
}
DEEPSEEK = SMALL | {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "kv_lora_rank": 10,
    "q_lora_rank": 14,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 8,
    "v_head_dim": 10,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 24,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
    "beta_fast": 32,
    "beta_slow": 1,
}
CASES = {
    "mixtral": ("Mixtral", SMALL | {"num_local_experts": 4}),
    "mixtral-window-one": ("Mixtral", SMALL | {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 7,
                                               "head_dim": 10, "tie_word_embeddings": True}),
    "qwen3-moe": ("Qwen3Moe", QWEN),
    "qwen3-moe-normed-mixed": ("Qwen3Moe", QWEN | {"norm_topk_prob": True, "mlp_only_layers": [1], "num_hidden_layers": 3,
                                                   "attention_bias": True}),
    "qwen3-moe-every-second": ("Qwen3Moe", QWEN | {"decoder_sparse_step": 2, "tie_word_embeddings": True}),
    "gpt-oss": ("GptOss", OSS),
    "gpt-oss-plain-rotation": ("GptOss", OSS | {"attention_bias": False, "num_experts_per_tok": 4, "swiglu_limit": 1.0,
                               "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
                               "layer_types": ["full_attention", "sliding_attention"]}),
    "deepseek-v3": ("DeepseekV3", DEEPSEEK),
    "deepseek-v3-yarn": ("DeepseekV3", DEEPSEEK | {"rope_parameters": YARN, "n_shared_experts": 2, "attention_bias": True,
                                                   "routed_scaling_factor": 1.3}),
    "deepseek-v3-one-group": ("DeepseekV3", DEEPSEEK | {"q_lora_rank": None, "n_group": 1, "topk_group": 1,
                                                        "norm_topk_prob": False, "num_experts_per_tok": 3, "v_head_dim": 8}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_parity(name, tmp_path):
    check_causal(peer(*CASES[name], tmp_path, seed=len(name)), tmp_path)


def test_experts_are_counted_before_they_are_built(tmp_path):
    theirs = peer(*CASES["mixtral"], tmp_path)
    config = json.loads((theirs.folder / "config.json").read_text())
    (theirs.folder / "config.json").write_text(json.dumps(config | {"num_local_experts": 10**9}))
    with pytest.raises(UserError, match="num_local_experts = 1000000000, and the file has"):
        import_huggingface(theirs.folder)
