"""Decoder-only families other than Llama's line, as `transformers` computes them."""

import pytest

from tests.models.parity import CONTEXT, check_causal, peer

GPT2 = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
NEOX = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 44,
    "max_position_embeddings": CONTEXT,
}
OPT = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "ffn_dim": 44,
    "word_embed_proj_dim": 24,
    "max_position_embeddings": CONTEXT,
}
BLOOM = {"hidden_size": 24, "n_layer": 2, "n_head": 4}
FALCON = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": CONTEXT}
GEMMA = {
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "sliding_window": 7,
    "max_position_embeddings": CONTEXT,
}
CASES = {
    "gpt2": ("GPT2", GPT2),
    "gpt2-odd": ("GPT2", GPT2 | {"n_embd": 21, "n_head": 3, "n_inner": 37, "activation_function": "relu",
                                 "scale_attn_weights": False, "layer_norm_epsilon": 1e-3}),
    "gpt2-untied": ("GPT2", GPT2 | {"tie_word_embeddings": False, "activation_function": "gelu"}),
    "neox": ("GPTNeoX", NEOX),
    "neox-half": ("GPTNeoX", NEOX | {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5,
                                                         "rope_type": "default"}, "attention_bias": False}),
    "neox-whole-sequential-tied": ("GPTNeoX", NEOX | {"use_parallel_residual": False, "tie_word_embeddings": True,
                                   "hidden_act": "gelu_new",
                                   "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.0, "rope_type": "linear",
                                                       "factor": 3.0}}),
    "opt": ("OPT", OPT),
    "opt-post-norm": ("OPT", OPT | {"do_layer_norm_before": False}),
    "opt-bare": ("OPT", OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False, "tie_word_embeddings": False,
                               "activation_function": "gelu"}),
    "opt-no-last-norm": ("OPT", OPT | {"_remove_final_layer_norm": True}),
    "bloom": ("Bloom", BLOOM),
    "bloom-odd-heads": ("Bloom", BLOOM | {"n_head": 6, "layer_norm_epsilon": 1e-4, "tie_word_embeddings": False}),
    "falcon-7b": ("Falcon", FALCON),
    "falcon-rw": ("Falcon", FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "falcon-mha-parallel": ("Falcon", FALCON | {"multi_query": False, "tie_word_embeddings": False, "ffn_hidden_size": 37}),
    "falcon-40b": ("Falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b": ("Falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1,
                                       "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "gemma2": ("Gemma2", GEMMA | {"query_pre_attn_scalar": 13}),
    "gemma2-no-caps": ("Gemma2", GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None,
                                          "num_key_value_heads": 4, "tie_word_embeddings": False}),
    "gemma2-tight": ("Gemma2", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
                                        "query_pre_attn_scalar": 10, "layer_types": ["full_attention"] * 3}),
    "gemma3": ("Gemma3Text", GEMMA | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}),
    "gemma3-scaled": ("Gemma3Text", GEMMA | {"num_key_value_heads": 1, "query_pre_attn_scalar": 24,
                      "layer_types": ["full_attention", "sliding_attention", "full_attention"],
                      "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
                                          "full_attention": {"rope_type": "linear", "rope_theta": 5e4, "factor": 8.0}}}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_parity(name, tmp_path):
    # Falcon's eager attention adds ALiBi's bias twice (transformers 5.23): to the mask and to the scores.
    attention = "sdpa" if CASES[name][1].get("alibi") else "eager"
    check_causal(peer(*CASES[name], tmp_path, seed=len(name), attention=attention), tmp_path)
