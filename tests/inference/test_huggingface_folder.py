"""`save` writes what `transformers` reads, and `load` reads what `transformers` writes: model, tokenizer and stop tokens."""

import pytest
import torch

from headspring.inference import LanguageModel
from headspring.models import MLP, Attention, Block, Decoder, repeat
from headspring.models.folder import is_native

transformers = pytest.importorskip("transformers")
PROMPT = "def add(a, b):"


@pytest.fixture
def theirs(lm, tmp_path):
    lm.save(tmp_path)
    assert not is_native(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    return model, transformers.AutoTokenizer.from_pretrained(tmp_path)


def test_a_saved_model_says_the_same_in_transformers(lm, theirs):
    model, tokenizer = theirs
    ids = lm.prompt_ids(PROMPT)
    assert [tokenizer.bos_token_id, *tokenizer.encode(PROMPT, add_special_tokens=False)] == ids
    with torch.no_grad():
        torch.testing.assert_close(model(torch.tensor([ids])).logits, lm.logits([ids]))
        prompt = torch.tensor([ids])
        answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False)
    assert answer[0, len(ids) :].tolist() == lm.generate(ids, max_tokens=16, temperature=0.0)[0].token_ids
    assert model.config.eos_token_id == [lm.tokenizer.eos_id, lm.tokenizer.end_id]


def test_what_transformers_saves_is_loaded(lm, theirs, tmp_path):
    model, tokenizer = theirs
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)  # as a training in transformers would change it
    model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    tuned = LanguageModel.load(tmp_path / "tuned", device="cpu")
    ids = lm.prompt_ids(PROMPT)
    with torch.no_grad():
        torch.testing.assert_close(tuned.logits([ids]), model(torch.tensor([ids])).logits)
    assert tuned.tokenizer.encode(PROMPT) == lm.tokenizer.encode(PROMPT)


def test_a_model_without_a_format_is_saved_in_ours(lm, tokenizer, tmp_path):
    block = Block(mixer=Attention(heads=2), feedforward=MLP(hidden=16))
    other = LanguageModel(Decoder(vocab=tokenizer.vocab_size, width=16, layers=repeat(1, block)).build(), tokenizer)
    other.save(tmp_path)
    assert is_native(tmp_path) and LanguageModel.load(tmp_path).config == other.config
