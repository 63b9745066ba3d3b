"""The Llama line, as `transformers` computes it."""

import json

import pytest
import torch

from headspring.models.dialects import import_huggingface
from tests.models.parity import CONTEXT, check_causal, close, peer, same_after_round_trip
from tests.models.test_dialects_decoders import CASES as DECODERS

SMALL = {
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": CONTEXT,
}
ROTATIONS = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24},
    "yarn-own": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 12,
        "beta_fast": 8.0,
        "beta_slow": 0.5,
        "attention_factor": 0.8,
        "truncate": False,
    },
}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.3, 2.0], "long_factor": [1.5, 2.0, 9.0]}
CASES = {
    **{f"llama-{name}": ("Llama", SMALL | {"rope_parameters": rope | {"rope_theta": 500.0}})
       for name, rope in ROTATIONS.items()},
    "llama-biases": ("Llama", SMALL | {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
    "qwen2-yarn": ("Qwen2", SMALL | {"num_key_value_heads": 2, "rope_parameters": ROTATIONS["yarn"] | {"rope_theta": 1e6}}),
    "qwen3-biases": ("Qwen3", SMALL | {"num_key_value_heads": 1, "head_dim": 8, "attention_bias": True,
                                       "use_sliding_window": True, "sliding_window": 6,
                                       "layer_types": ["sliding_attention", "full_attention"]}),
    "phi3-longrope-long": ("Phi3", SMALL | {"rope_parameters": LONG, "original_max_position_embeddings": 8}),
    "phi3-longrope-short": ("Phi3", SMALL | {"rope_parameters": LONG | {"attention_factor": 1.2},
                                             "original_max_position_embeddings": 64}),
    "phi3-partial": ("Phi3", SMALL | {"num_key_value_heads": 1, "hidden_size": 32,
                                      "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                          "partial_rotary_factor": 0.5}}),

    "llama-mha": ("Llama", SMALL),
    "llama-gqa-tied": ("Llama", SMALL | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama-head-dim": ("Llama", SMALL | {"num_key_value_heads": 1, "head_dim": 10, "rms_norm_eps": 1e-5}),
    "qwen2": ("Qwen2", SMALL | {"num_key_value_heads": 2}),
    "qwen2-tied": ("Qwen2", SMALL | {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", SMALL | {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 5,
                                       "num_hidden_layers": 3, "max_window_layers": 1}),
    "qwen3": ("Qwen3", SMALL | {"num_key_value_heads": 2, "head_dim": 12}),
    "qwen3-odd": ("Qwen3", SMALL | {"hidden_size": 23, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 14,
                                    "tie_word_embeddings": True,
                                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "mistral": ("Mistral", SMALL | {"num_key_value_heads": 2, "sliding_window": None}),
    "mistral-window": ("Mistral", SMALL | {"num_key_value_heads": 2, "sliding_window": 7}),
    "mistral-wide-window": ("Mistral", SMALL | {"num_key_value_heads": 2, "sliding_window": CONTEXT}),
    "phi3": ("Phi3", SMALL | {"num_key_value_heads": 2}),
    "phi3-window": ("Phi3", SMALL | {"num_key_value_heads": 2, "sliding_window": 9}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_parity(name, tmp_path):
    check_causal(peer(*CASES[name], tmp_path, seed=len(name)), tmp_path)


@torch.no_grad()
def test_dynamic_rotation_within_and_beyond_the_context_of_training(tmp_path):
    """Its frequencies depend on the length. (`transformers` keeps keys in its cache that were rotated for another length, and
    takes the longest row of a batch for all: there, ours is compared with itself, in `test_position`.)"""
    rope = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4}
    theirs = peer("Llama", SMALL | {"max_position_embeddings": 20, "rope_parameters": rope}, tmp_path)
    ours = import_huggingface(theirs.folder)
    assert ours.config.context == 60
    for length in (17, 33, 60):
        tokens = torch.randint(1, 61, (2, length))
        close(ours.logits(ours(tokens)), theirs.model(tokens).logits)
    same_after_round_trip(theirs, ours, tmp_path)


@pytest.mark.parametrize("name", ["llama-yarn", "llama-llama3", "neox", "phi3-longrope-long", "gemma3-scaled"])
def test_the_spelling_before_transformers_5(name, tmp_path):
    """`rope_theta` and `rope_scaling` in the place of `rope_parameters` give the same value."""
    theirs = peer(*(CASES | DECODERS)[name], tmp_path)
    expected = import_huggingface(theirs.folder).config
    config = json.loads((theirs.folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    if name == "gemma3-scaled":
        config |= {"rope_theta": 5e4, "rope_local_base_freq": 300.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    elif name == "neox":
        config |= {"rotary_pct": 0.25, "rotary_emb_base": 10000}
    else:
        rope["type"] = rope.pop("rope_type")
        config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (theirs.folder / "config.json").write_text(json.dumps(config))
    assert import_huggingface(theirs.folder).config == expected
