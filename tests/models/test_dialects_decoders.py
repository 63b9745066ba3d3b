"""Decoder-only families other than Llama's line, as `transformers` computes them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from headspring.artifacts import UserError
from headspring.models.dialects import import_huggingface
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


def spoil(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("opt", {"word_embed_proj_dim": 12}, "opt-350m"),
        ("gpt2", {"n_positions": 10**9}, r"wpe\.weight \(our embed\.positions\.weight\) is 96 × 24, .* 1000000000 × 24"),
        ("gpt2", {"n_layer": 10**9}, "n_layer = 1000000000, and the file has"),
        ("gpt2", {"activation_function": "mish"}, "'mish' is not supported; those that are: gelu"),
        ("neox", {"intermediate_size": 45}, r"dense_h_to_4h\.weight \(our .*\) is 44 × 24, the config makes it 45 × 24"),
        ("falcon-7b", {"num_ln_in_parallel_attn": 2}, "belongs to new_decoder_architecture"),
        ("falcon-7b", {"partial_rotary_factor": 0.5}, "turns whole heads"),
        ("falcon-40b", {"num_kv_heads": 4}, r"query_key_value\.weight .* is 48 × 24, the config makes it 72 × 24"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "only False"),
        ("gemma2", {"use_bidirectional_attention": True}, "sees no later tokens"),
        ("gemma3", {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "layer_types = "),
    ],
)
def test_what_is_not_supported_is_refused_in_a_line(name, changes, says, tmp_path):
    theirs = peer(*CASES[name], tmp_path)
    spoil(theirs.folder, **changes)
    with pytest.raises(UserError, match=says) as caught:
        import_huggingface(theirs.folder)
    assert "\n" not in str(caught.value)


def test_a_file_of_the_bare_model_with_masks_in_it(tmp_path):
    """The files of GPT-2 on the hub: no prefix, and a causal mask in each layer, in bytes."""
    theirs = peer(*CASES["gpt2"], tmp_path)
    expected = import_huggingface(theirs.folder)
    stored = load_file(theirs.folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    bare |= {f"h.{i}.attn.bias": torch.ones(1, 1, CONTEXT, CONTEXT, dtype=torch.uint8).tril() for i in range(2)}
    save_file(bare, theirs.folder / "model.safetensors")
    found = import_huggingface(theirs.folder)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))
