"""Mamba and Mamba-2, as `transformers` computes them."""

import json

import pytest
import torch

from headspring.artifacts import UserError
from headspring.models.dialects import import_huggingface
from tests.models.parity import check_causal, peer

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "state_size": 5}
HEADS = {"num_heads": 4, "head_dim": 12, "n_groups": 1, "chunk_size": 16}
CASES = {
    "mamba": ("Mamba", SMALL),
    "mamba-odd": ("Mamba", SMALL | {"hidden_size": 23, "state_size": 1, "time_step_rank": 3, "conv_kernel": 3,
                                    "use_conv_bias": False, "tie_word_embeddings": False}),
    "mamba-wide": ("Mamba", SMALL | {"expand": 3, "num_hidden_layers": 3, "layer_norm_epsilon": 1e-6}),
    "mamba2": ("Mamba2", SMALL | HEADS),
    "mamba2-groups": ("Mamba2", SMALL | HEADS | {"n_groups": 2, "chunk_size": 7, "tie_word_embeddings": True}),
    "mamba2-wide": ("Mamba2", SMALL | HEADS | {"expand": 3, "num_heads": 3, "head_dim": 24, "n_groups": 3, "conv_kernel": 2,
                                               "use_conv_bias": False, "layer_norm_epsilon": 1e-6}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_parity(name, tmp_path):
    check_causal(peer(*CASES[name], tmp_path, seed=len(name)), tmp_path)


@pytest.mark.parametrize("kind", ["Mamba", "Mamba2"])
def test_parity_with_biases(kind, tmp_path):
    """With biases on the projections a pad of theirs reaches the convolution; ours is removed. The rest is the same."""
    theirs = peer(kind, SMALL | {"use_bias": True} | (HEADS if kind == "Mamba2" else {}), tmp_path)
    ours, tokens = import_huggingface(theirs.folder), torch.arange(1, 41)[None]
    with torch.no_grad():
        expected = theirs.model(tokens).logits
        torch.testing.assert_close(ours.logits(ours(tokens)), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"time_step_limit": [0.0, 1.0]}, "time_step_limit"), ({"num_heads": 5}, "num_heads"), ({"n_groups": 3}, "groups")],
    ids=["limit", "heads", "groups"],
)  # fmt: skip
def test_what_ours_does_not_compute_is_refused(changes, message, tmp_path):
    folder = peer("Mamba2", SMALL | HEADS, tmp_path).folder
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=message) as caught:
        import_huggingface(folder)
    assert "\n" not in str(caught.value)
