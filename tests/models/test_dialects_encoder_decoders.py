"""T5 (1.0 and 1.1) and BART against `transformers`: logits, padded sources, greedy answers with a cache, the way back."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from headspring.artifacts import UserError
from headspring.models.dialects import import_huggingface
from tests.models.parity import VOCAB, Peer, close, peer, randomise, same_after_round_trip

T5 = {"d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 3,
      "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "decoder_start_token_id": 0}  # fmt: skip
BART = {"d_model": 24, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 3, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 40, "decoder_ffn_dim": 36, "max_position_embeddings": 64, "pad_token_id": 1,
        "decoder_start_token_id": 2, "forced_eos_token_id": None}  # fmt: skip
V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
CASES = {
    "t5": ("T5", T5),
    "t5-wide-heads": ("T5", {**T5, "d_kv": 10, "num_heads": 5, "num_layers": 1, "num_decoder_layers": None}),
    "t5-v1.1": ("T5", {**T5, **V1_1}),
    "t5-v1.1-many-buckets": ("T5", {**T5, **V1_1, "relative_attention_num_buckets": 32, "d_kv": 8}),
    "bart": ("Bart", BART),
    "bart-scaled-relu": ("Bart", {**BART, "scale_embedding": True, "activation_function": "relu", "decoder_layers": 2}),
}
SOURCE, TIME = 19, 30


def pair(name: str, place):
    """A peer and our reading of its folder. A head of its own is set apart by hand: the class ties it at birth."""
    kind, settings = CASES[name]
    theirs = peer(kind, settings, place, auto="AutoModelForSeq2SeqLM")
    if settings.get("tie_word_embeddings") is False:
        theirs.model.lm_head.weight = torch.nn.Parameter(torch.empty_like(theirs.model.lm_head.weight))
        randomise(theirs.model.lm_head, seed=2)
        theirs.model.save_pretrained(theirs.folder)
    return theirs, import_huggingface(theirs.folder)


def ids(rows: int, time: int, seed: int) -> torch.Tensor:
    """Anything but pads and starts."""
    return torch.randint(3, VOCAB, (rows, time), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_parity(name, tmp_path):
    theirs, ours = pair(name, tmp_path)
    source, tokens = ids(3, SOURCE, 1), ids(3, TIME, 2)
    expected = theirs.model(source, decoder_input_ids=tokens).logits
    close(ours.logits(ours(tokens, source=source)), expected)
    same_when_padded(theirs, ours, source, tokens)
    same_answer(theirs, ours, source[:1])
    same_after_round_trip(theirs, ours, tmp_path)
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    close(again(source, decoder_input_ids=tokens).logits, expected, 1e-6)


def same_when_padded(theirs: Peer, ours, source: torch.Tensor, tokens: torch.Tensor) -> None:
    """Sources of three lengths: pads on the right of theirs (BART counts columns), on the left of ours."""
    lengths = [SOURCE, 5, 11]
    right, mask = source.clone(), torch.arange(SOURCE) < torch.tensor(lengths)[:, None]
    right[~mask] = 0
    left = torch.stack([row.roll(SOURCE - length) for row, length in zip(right, lengths)])
    expected = theirs.model(right, attention_mask=mask.long(), decoder_input_ids=tokens).logits
    found = ours.logits(ours(tokens, source=left, source_padding=SOURCE - torch.tensor(lengths)))
    close(found, expected)


def same_answer(theirs: Peer, ours, source: torch.Tensor, count: int = 32) -> None:
    """`count` greedy tokens, the memory and what came before in a state. Theirs has no cache where its sides differ in depth:
    it makes as many layers of it as the encoder has."""
    lengths = {"max_new_tokens": count, "min_new_tokens": count}
    same_depth = len(ours.config.encoder.layers) == len(ours.config.decoder.layers)
    mask = torch.ones_like(source)
    answer = theirs.model.generate(source, attention_mask=mask, do_sample=False, use_cache=same_depth, **lengths)
    state = ours.new_state(1)
    new = torch.tensor([[ours.config.start]])
    found = new[0].tolist()
    for step in range(count):
        hidden = ours(new, state=state, source=None if step else source)
        new = ours.logits(hidden[:, -1:]).argmax(-1)
        found += new[0].tolist()
    assert found == answer[0].tolist()


@torch.no_grad()
def test_files_of_google(tmp_path):
    """Version 1.1 as it was published: untied in so many words, both copies of the table, a bias that nothing reads."""
    theirs, ours = pair("t5-v1.1", tmp_path)
    config = json.loads((theirs.folder / "config.json").read_text())
    del config["scale_decoder_outputs"]
    (theirs.folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    tensors = load_file(theirs.folder / "model.safetensors")
    tensors |= {f"{side}.embed_tokens.weight": tensors["shared.weight"].clone() for side in ("encoder", "decoder")}
    tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.ones(8, 3)
    save_file(tensors, theirs.folder / "model.safetensors", {"format": "pt"})
    again = import_huggingface(theirs.folder)
    assert again.config == ours.config and not again.config.decoder.tied
    for (name, a), b in zip(ours.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("kind", "settings", "change", "message"),
    [
        ("T5", T5, {"feed_forward_proj": "gated-mish"}, "feed_forward_proj = 'gated-mish' is not supported; those that are"),
        ("T5", T5, {"is_encoder_decoder": False}, "is_encoder_decoder = False is not supported"),
        ("T5", T5, {"num_decoder_layers": 10**9}, "too few for that"),
        ("Bart", BART, {"tie_word_embeddings": False}, "tie_word_embeddings = False is not supported"),
        ("Bart", BART, {"activation_function": "mish"}, "activation_function = 'mish' is not supported"),
        ("Bart", BART, {"max_position_embeddings": 32}, "embed.positions.weight"),
    ],
)
def test_what_is_not_this_function_is_refused(kind, settings, change, message, tmp_path):
    theirs = peer(kind, settings, tmp_path, auto="AutoModelForSeq2SeqLM")
    config = json.loads((theirs.folder / "config.json").read_text())
    (theirs.folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        import_huggingface(theirs.folder)


@torch.no_grad()
def test_a_control(tmp_path):
    """A factor of 1/√C and a position off by one are seen."""
    source, tokens = ids(2, SOURCE, 1), ids(2, TIME, 2)
    theirs, ours = pair("t5", tmp_path / "t5")
    ours.decoder.layers[0].cross.f.scoring = type(ours.decoder.layers[0].cross.f.scoring)(6**-0.5)
    with pytest.raises(AssertionError, match="relative error"):
        close(ours.logits(ours(tokens, source=source)), theirs.model(source, decoder_input_ids=tokens).logits)
    theirs, ours = pair("bart", tmp_path / "bart")
    ours.encoder.embed.positions.offset = 1
    with pytest.raises(AssertionError, match="relative error"):
        close(ours.logits(ours(tokens, source=source)), theirs.model(source, decoder_input_ids=tokens).logits)
