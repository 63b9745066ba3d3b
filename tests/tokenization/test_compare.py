"""The measures against their definitions, and the tables."""

import io
import json
import math
from collections import Counter

import numpy as np
import pytest
from rich.console import Console
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as LibraryTokenizer

from headspring.tokenization import Tokenizer, TokenizerConfig, corpora, metrics, train_tokenizer
from headspring.tokenization.compare import compare
from headspring.tokenization.cost import ModelShape, cost
from headspring.tokenization.parallel import PARALLEL


def test_measures_by_hand(bpe: Tokenizer):
    texts = ["return self", "returnx 🙂\n"]
    found = metrics.measure(bpe, texts)
    rows = [bpe.encode(text) for text in texts]
    assert found.bytes == sum(len(text.encode()) for text in texts) and found.characters == sum(map(len, texts))
    assert found.tokens == sum(map(len, rows)) and found.words == 4
    assert found.bytes_per_token == found.bytes / found.tokens
    assert found.mean_bytes_per_token == pytest.approx(
        np.mean([len(text.encode()) / len(row) for text, row in zip(texts, rows)])
    )
    assert found.fertility == found.tokens / 4
    assert found.continued_words == 2 / 4  # "return" and " self" are tokens, "returnx" and "🙂" are not
    assert found.vocabulary_use == len(set(rows[0] + rows[1])) / (bpe.vocab_size - 7)
    assert found.unknown == 0


def test_unknown_tokens_are_counted(trained: dict[str, Tokenizer]):
    assert metrics.measure(trained["wordpiece"], ["語 def"]).unknown == 0.5


def test_an_empty_corpus_measures_nothing(bpe: Tokenizer):
    found = metrics.measure(bpe, [""])
    assert found.tokens == 0 and math.isnan(found.bytes_per_token) and math.isnan(found.fertility)


def test_continued_words_against_a_slow_count(bpe: Tokenizer, texts: list[str]):
    text = texts[1][:3000] + " naïve 日本 語"
    _, spans = bpe.encode_with_spans(text)
    data, slow, position = text.encode(), 0, 0
    starts = set(spans[:, 0].tolist())
    for word in text.split():
        position = data.index(word.encode(), position)
        end = position + len(word.encode())
        slow += any(position < start < end for start in starts)
        position = end
    assert metrics.continued_words(text, spans) == slow


def test_renyi_efficiency():
    assert metrics.renyi_efficiency([5, 5, 5, 5]) == pytest.approx(1)
    p = np.array([3, 1]) / 4
    assert metrics.renyi_efficiency([3, 1]) == pytest.approx(np.log2((p**2.5).sum()) / -1.5 / 1)
    near_shannon = metrics.renyi_efficiency([3, 1], alpha=1 + 1e-6)
    assert near_shannon == pytest.approx(-(p * np.log2(p)).sum(), abs=1e-4)
    assert metrics.renyi_efficiency([9, 1]) < metrics.renyi_efficiency([6, 4])


def test_gini():
    assert metrics.gini([2, 2, 2]) == 0
    assert metrics.gini([0, 0, 0, 1]) == pytest.approx(0.75)
    assert metrics.gini([1, 3]) == pytest.approx(0.25)


def test_parity(bpe: Tokenizer):
    assert metrics.parity(bpe, ["a b", "c"], ["a b", "c"]) == metrics.Parity(1.0, 1.0)
    double = metrics.parity(bpe, ["qzj qzj", "x y"], ["qzj", "x y"])
    lengths = [len(bpe.encode(text)) for text in ("qzj qzj", "qzj", "x y")]
    assert double.parity == pytest.approx((lengths[0] + lengths[2]) / (lengths[1] + lengths[2]))
    assert double.premium == pytest.approx((lengths[0] / lengths[1] + 1) / 2)


def number_tokenizer(pattern: str) -> Tokenizer:
    """A byte-level tokenizer that has every number up to 999 and cuts digits by `pattern`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    numbers = [str(n) for n in range(10, 1000)] + [f"{n:02d}" for n in range(10)] + [f"{n:03d}" for n in range(100)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(alphabet + numbers))}
    merges = [(n[:-1], n[-1]) for n in numbers]
    library = LibraryTokenizer(models.BPE(vocab, merges, ignore_merges=True))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])
    library.decoder = decoders.ByteLevel()
    return Tokenizer(library)


@pytest.mark.parametrize(
    ("pattern", "left", "right", "both"),
    [
        (r"\p{N}{1,3}", 2 / 3, 0, 1 / 3),
        (r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))", 0, 2 / 3, 1 / 3),
        (r"\p{N}", 0, 0, 1),
    ],
)
def test_digit_alignment(pattern: str, left: float, right: float, both: float):
    found = metrics.digit_splitting(number_tokenizer(pattern))
    assert (found.left_aligned, found.right_aligned, found.both) == pytest.approx((left, right, both), abs=0.01)
    assert found.inconsistent == 0 and found.longest == (1 if both == 1 else 3)
    assert found.mean_tokens[6] == (6 if both == 1 else 2)


def test_inconsistent_digits():
    corpus = [" 1234 1234 5 67 67 890" * 50]
    found = metrics.digit_splitting(train_tokenizer(corpus, TokenizerConfig(vocab_size=269, digits="runs")))
    assert found.inconsistent > 0


def test_faults(bpe: Tokenizer, texts: list[str]):
    """Plant one of each: `xyzzy` whose parts never meet, a lone continuation byte, a token the corpus lacks."""
    description = json.loads(bpe.library.to_str())
    description["added_tokens"] = []
    description["model"]["vocab"]["xyzzy"] = planted = bpe.vocab_size
    planted_tokenizer = Tokenizer(LibraryTokenizer.from_str(json.dumps(description)))
    faults = metrics.token_faults(planted_tokenizer, texts)
    assert faults.unreachable == [planted]
    lone = [i for i in range(bpe.vocab_size) if bpe.token_bytes(i) == b"\x80"]
    assert set(lone) <= set(faults.undecodable) and planted not in faults.undecodable
    counts = Counter(i for text in texts for i in bpe.encode(text))
    assert planted in faults.never_trained
    assert set(faults.never_trained) == {i for i in range(planted + 1) if counts[i] == 0} - bpe.control_ids
    assert metrics.token_faults(bpe).never_trained is None


def test_token_counts_do_not_depend_on_batches(bpe: Tokenizer, texts: list[str]):
    lines = texts[1].splitlines()
    assert (metrics.token_counts(bpe, lines, batch=7) == metrics.token_counts(bpe, lines)).all()


def test_cost_by_hand():
    shape = ModelShape(layers=2, width=8, heads=4, kv_heads=2, head_dim=16, bytes=2, tied=False, context=100)
    found = cost(vocab_size=50, characters=2000, tokens=500, shape=shape)
    assert found.embedding_parameters == 2 * 50 * 8 and found.tokens == 250
    assert found.kv_cache_bytes == 250 * 2 * 2 * 2 * 16 * 2
    assert found.attention_flops == sum(4 * 2 * 4 * 16 * keys for keys in range(1, 251))
    assert found.context_characters == 400


def test_parallel_sentences_are_parallel():
    assert {len(lines) for lines in PARALLEL.values()} == {10} and len(PARALLEL) == 12
    assert len({line for lines in PARALLEL.values() for line in lines}) == 120


def test_built_in_corpora_are_held_out():
    held_out = corpora.built_in()
    assert {"prose", "code", "numbers", "English", "Japanese"} <= set(held_out)
    training = set(corpora.read_texts(["stdlib"])) - {""}
    assert not training & set(held_out["code"]) and not training & set(held_out["prose"])


def test_comparison(trained: dict[str, Tokenizer], texts: list[str]):
    small = {"code": [texts[1][:3000]], "English": PARALLEL["English"]}
    comparison = compare(trained, small, training={"bpe": texts})
    value = comparison.to_json()
    json.dumps(value, allow_nan=False)
    assert set(value["tokenizers"]) == set(trained)
    report = value["tokenizers"]["bpe"]
    assert report["parity"]["English"]["parity"] == 1 and report["parity"]["Hindi"]["parity"] > 3
    assert report["gini"] > 0.1 and report["faults"]["never_trained"] is not None
    assert value["tokenizers"]["unigram"]["faults"]["never_trained"] is None
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(comparison)
    text = console.export_text()
    assert "Bytes per token" in text and "embedding parameters" in text and "not known" in text
