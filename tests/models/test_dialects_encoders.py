"""BERT, RoBERTa, XLM-RoBERTa and ModernBERT against `transformers`."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from headspring.artifacts import UserError
from headspring.models.dialects import export_huggingface, import_huggingface
from headspring.models.position.absolute import LearnedModule
from tests.models.parity import VOCAB, close, peer, same_after_round_trip

BERT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
        "max_position_embeddings": 50, "layer_norm_eps": 1e-6}  # fmt: skip
MODERN = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 36,
          "max_position_embeddings": 64, "local_attention": 12}  # fmt: skip
CASES = {
    "bert": ("Bert", BERT),
    "bert-relu-one-type": ("Bert", {**BERT, "hidden_act": "relu", "type_vocab_size": 1, "num_hidden_layers": 1}),
    "bert-gelu-tanh": ("Bert", {**BERT, "hidden_act": "gelu_new", "num_attention_heads": 3}),
    "roberta": ("Roberta", {**BERT, "type_vocab_size": 1, "pad_token_id": 1}),
    "roberta-pad-zero": ("Roberta", BERT),
    "xlm-roberta": ("XLMRoberta", {**BERT, "type_vocab_size": 1, "pad_token_id": 1, "hidden_act": "relu"}),
    "modernbert": ("ModernBert", MODERN),
    "modernbert-biases": ("ModernBert", {**MODERN, "norm_bias": True, "attention_bias": True, "mlp_bias": True,
                                         "classifier_bias": True, "global_attn_every_n_layers": 2}),
    "modernbert-untied": ("ModernBert", {**MODERN, "tie_word_embeddings": False, "decoder_bias": False,
                                         "hidden_activation": "silu", "local_attention": 7}),
}  # fmt: skip
TIME = 40


def tokens(pad: int) -> torch.Tensor:
    """(3, T) of anything but the pad, which RoBERTa counts positions by."""
    return torch.randint(pad + 1, VOCAB, (3, TIME), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_masked_language_models(name, tmp_path):
    kind, settings = CASES[name]
    theirs = peer(kind, settings, tmp_path, auto="AutoModelForMaskedLM")
    ours = import_huggingface(theirs.folder)
    ids = tokens(settings.get("pad_token_id", 0))
    expected = theirs.model(ids).logits
    close(ours.logits(ours(ids)), expected)
    same_when_padded(theirs.model, ours, ids)
    same_after_round_trip(theirs, ours, tmp_path)
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    assert torch.equal(again(ids).logits, expected)


def same_when_padded(theirs, ours, ids: torch.Tensor) -> None:
    """Rows of three lengths, padded on the left, each with its positions from the first token on."""
    padding = torch.tensor([0, 7, TIME // 2])
    mask = torch.arange(TIME) >= padding[:, None]
    positions = {}
    if isinstance(ours.embed.positions, LearnedModule):
        positions["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0) + ours.embed.positions.offset
    expected = theirs(torch.where(mask, ids, 0), attention_mask=mask.long(), **positions).logits
    close(ours.logits(ours(torch.where(mask, ids, 5), padding=padding))[mask], expected[mask])


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "XLMRoberta"])
@torch.no_grad()
def test_bare_models_with_pooler(kind, tmp_path):
    """As embedding models are saved: no head, and types of tokens."""
    theirs = peer(kind, {**BERT, "pad_token_id": 1}, tmp_path, auto="AutoModel")
    ours = import_huggingface(theirs.folder)
    ids, types = tokens(1), (torch.arange(TIME) > 11).long().expand(3, TIME)
    expected = theirs.model(ids, token_type_ids=types)
    hidden = ours(ids, types=types)
    close(hidden, expected.last_hidden_state)
    close(ours.pooled(hidden[:, 0]), expected.pooler_output)
    same_after_round_trip(theirs, ours, tmp_path)
    with pytest.raises(UserError, match="without a head"):
        ours.logits(hidden)


@torch.no_grad()
def test_files_of_2018(tmp_path):
    """Norms called gamma and beta, a head that repeats what is tied, and heads that this architecture does not use."""
    theirs = peer("Bert", BERT, tmp_path, auto="AutoModelForMaskedLM")
    tensors = load_file(theirs.folder / "model.safetensors")
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
           for name, tensor in tensors.items()}  # fmt: skip
    old["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    old |= {"cls.seq_relationship.weight": torch.ones(2, 24), "bert.embeddings.position_ids": torch.arange(50.0)}
    save_file(old, theirs.folder / "model.safetensors", {"format": "pt"})
    ids = tokens(0)
    ours = import_huggingface(theirs.folder)
    close(ours.logits(ours(ids)), theirs.model(ids).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False is not supported"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key' is not supported"),
        ({"is_decoder": True}, "is_decoder = True is not supported"),
        ({"hidden_act": "mish"}, "hidden_act = 'mish' is not supported; those that are: gelu"),
        ({"type_vocab_size": 3}, "embed.types.weight"),
    ],
)
def test_what_is_not_this_function_is_refused(change, message, tmp_path):
    theirs = peer("Bert", BERT, tmp_path, auto="AutoModelForMaskedLM")
    config = json.loads((theirs.folder / "config.json").read_text())
    (theirs.folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        import_huggingface(theirs.folder)


def test_a_control(tmp_path):
    """A position off by one is seen."""
    theirs = peer("Roberta", {**BERT, "pad_token_id": 1}, tmp_path, auto="AutoModelForMaskedLM")
    ours = import_huggingface(theirs.folder)
    ours.embed.positions.offset = 1
    with pytest.raises(AssertionError, match="relative error"), torch.no_grad():
        close(ours.logits(ours(tokens(1))), theirs.model(tokens(1)).logits)
    export_huggingface(ours, tmp_path / "whole")  # what is written follows from the value, which did not change
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["pad_token_id"] == 1
