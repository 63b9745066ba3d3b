"""The library against the papers."""

import doctest
import inspect
import itertools
import math
import tarfile
import typing
from collections import Counter

import pytest
import torch

from headspring.tokenization import Tokenizer, TokenizerConfig, train_tokenizer
from headspring.tokenization.reference import bpe as reference
from headspring.tokenization.reference import unigram, wordpiece
from headspring.tokenization.splitting import chunks


def words_of(tokenizer: Tokenizer, texts: list[str]) -> Counter[str]:
    """What the library counts: the distinct pieces its pre-tokenizer makes of the texts."""
    split = tokenizer.library.pre_tokenizer.pre_tokenize_str
    return Counter(word for text in texts for part in chunks(text) for word, _ in split(part))


def library_merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(merge) for merge in tokenizer.description["model"]["merges"]]


@pytest.fixture(scope="module")
def alphabet(bpe: Tokenizer) -> list[str]:
    vocab = bpe.description["model"]["vocab"]
    return sorted(vocab, key=vocab.__getitem__)[:256]


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    """300 KB of the standard library."""
    return [inspect.getsource(module) for module in (doctest, inspect, tarfile, typing)]


def test_bpe_merges_equal_the_librarys(corpus: list[str], alphabet: list[str]):
    assert sum(map(len, corpus)) > 300_000
    tokenizer = train_tokenizer(corpus, TokenizerConfig(vocab_size=256 + 7 + 800))
    words = words_of(tokenizer, corpus)
    assert reference.train(words, alphabet, 800, min_frequency=2) == library_merges(tokenizer)


def test_bpe_merges_depend_on_the_tie_rule(texts: list[str], bpe: Tokenizer, alphabet: list[str]):
    """The control: ids in another order change which of two equal pairs comes first."""
    words = words_of(bpe, texts)
    merges = library_merges(bpe)
    assert reference.train(words, alphabet, len(merges), 2) == merges
    assert reference.train(words, alphabet[::-1], len(merges), 2) != merges


def test_bpe_stops_where_nothing_is_left(alphabet: list[str]):
    assert reference.train({"abab": 3}, "ab", 10) == [("a", "b"), ("ab", "ab")]
    assert reference.train({"ab": 1}, "ab", 10, min_frequency=2) == []
    assert reference.train({"aaaa": 2}, "a", 1) == [("a", "a")]


def test_bpe_encodes_as_the_library(texts: list[str], trained: dict[str, Tokenizer]):
    tokenizer = trained["bpe"]
    ranks = {pair: rank for rank, pair in enumerate(library_merges(tokenizer))}
    split = tokenizer.library.pre_tokenizer.pre_tokenize_str
    text = texts[1][:20_000] + " naïve 🙂 cryptocurrency aaaaaa"
    pieces = [piece for word, _ in split(text) for piece in reference.encode(list(word), ranks)]
    assert pieces == [tokenizer.token(i) for i in tokenizer.encode(text)]


def test_wordpiece_encodes_as_the_library(texts: list[str], trained: dict[str, Tokenizer]):
    tokenizer = trained["wordpiece"]
    vocab = tokenizer.description["model"]["vocab"]
    split = tokenizer.library.pre_tokenizer.pre_tokenize_str
    text = texts[1][:20_000] + " naïve 語 cryptocurrency"
    pieces = [piece for word, _ in split(text) for piece in wordpiece.encode(word, vocab, "[UNK]")]
    assert pieces == [tokenizer.token(i) for i in tokenizer.encode(text)]


def test_the_librarys_wordpiece_is_bpe(texts: list[str]):
    """Documented: its trainer merges by count, not by likelihood."""
    library = train_tokenizer(texts[1:], TokenizerConfig(kind="wordpiece", vocab_size=800))
    vocab = set(library.description["model"]["vocab"]) - {"[UNK]"}
    words = words_of(library, texts[1:])
    by_likelihood = set(wordpiece.train(words, 300))
    by_count = set(_wordpiece_by_count(words, len(vocab)))
    assert len(by_count & vocab) / len(vocab) > 0.9  # the rest are ties
    learned = {piece for piece in by_likelihood if len(piece.removeprefix("##")) > 1}
    assert len(learned & vocab) / len(learned) < 0.5


def _wordpiece_by_count(words: Counter[str], size: int) -> list[str]:
    spelled = {word: wordpiece.spell(word) for word in words}
    vocab = sorted({symbol for symbols in spelled.values() for symbol in symbols})
    pairs, _ = wordpiece.count(spelled, words)
    while len(vocab) < size:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        piece = wordpiece.join(*best)
        vocab += [piece] if piece not in vocab else []
        changed = {w: p for w, p in spelled.items() if best in itertools.pairwise(p)}
        pairs.subtract(wordpiece.count(changed, words)[0])
        spelled.update({w: wordpiece._merge(p, best, piece) for w, p in changed.items()})
        pairs.update(wordpiece.count({w: spelled[w] for w in changed}, words)[0])
        del pairs[best]
    return vocab


def test_wordpiece_prefers_parts_that_belong_together():
    words = {"qu": 5, "th": 50, "to": 50, "ah": 50}
    assert wordpiece.train(words, 7)[-1] == "qu"
    assert reference.train(words, sorted("qutaho"), 1) != [("q", "u")]


@pytest.fixture(scope="module")
def small_words(texts: list[str], trained: dict[str, Tokenizer]) -> Counter[str]:
    return words_of(trained["unigram"], [texts[2][:40_000]])


def test_unigram_em_never_lowers_the_likelihood(small_words: Counter[str]):
    """With the plain estimate count/total, each EM step can only help; the control shuffles the counts."""
    pieces = unigram.seed(small_words, 3000)
    seen = [unigram.log_likelihood(small_words, pieces)]
    for _ in range(3):
        expected = unigram.expect(small_words, pieces)
        total = sum(expected.values())
        pieces = {piece: math.log(max(n, 1e-300) / total) for piece, n in expected.items()}
        seen.append(unigram.log_likelihood(small_words, pieces))
    assert seen == sorted(seen)
    wrong = dict(zip(pieces, reversed(list(pieces.values())), strict=True))
    assert unigram.log_likelihood(small_words, wrong) < seen[0]


def test_unigram_expected_counts_by_hand():
    """Two segmentations of "ab": p(ab) = 1/2 and p(a)p(b) = 1/16."""
    pieces = {"ab": math.log(1 / 2), "a": math.log(1 / 4), "b": math.log(1 / 4)}
    expected = unigram.expect({"ab": 9}, pieces)
    assert expected["ab"] == pytest.approx(8) and expected["a"] == pytest.approx(1)
    assert unigram.log_likelihood({"ab": 1}, pieces) == pytest.approx(math.log(9 / 16))


def test_unigram_against_the_library(texts: list[str], small_words: Counter[str]):
    config = TokenizerConfig(kind="unigram", vocab_size=400 + 256 + 7)
    library = train_tokenizer([texts[2][:40_000]], config)
    theirs = {p: s for p, s in library.description["model"]["vocab"][1:] if not p.startswith("<0x")}
    ours = unigram.train(small_words, len(theirs))
    assert len(ours) == len(theirs)
    assert sum(map(math.exp, ours.values())) == pytest.approx(1, abs=0.02)
    tokens = {
        name: sum(n * len(unigram.encode(w, p)) for w, n in small_words.items())
        for name, p in (("ours", ours), ("theirs", theirs))
    }
    assert tokens["ours"] <= 1.02 * tokens["theirs"]  # a weighted seed can only help
    same = sum(n * (unigram.encode(w, ours) == unigram.encode(w, theirs)) for w, n in small_words.items())
    assert same / small_words.total() > 0.5


def test_unigram_encodes_as_the_library(texts: list[str], trained: dict[str, Tokenizer]):
    tokenizer = trained["unigram"]
    vocab = tokenizer.description["model"]["vocab"]
    pieces = {p: s for p, s in vocab[1:] if not p.startswith("<0x")}
    split = tokenizer.library.pre_tokenizer.pre_tokenize_str
    text = texts[1][:20_000]
    expected = [piece for word, _ in split(text) for piece in unigram.encode(word, pieces)]
    found = [tokenizer.token(i) for i in tokenizer.encode(text)]
    assert found == expected


def test_digamma():
    for x in (0.5, 1.0, 3.7, 100.0):
        assert unigram._digamma(x) == pytest.approx(torch.digamma(torch.tensor(x, dtype=torch.float64)).item())
