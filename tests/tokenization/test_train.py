"""Training: what comes out, and what is refused."""

import pytest
from pydantic import ValidationError

from headspring.artifacts import UserError
from headspring.tokenization import Tokenizer, TokenizerConfig, train_tokenizer


def test_vocab_size_counts_everything(tokenizer: Tokenizer):
    assert tokenizer.vocab_size == 1200
    assert sorted(tokenizer.control.values()) == list(range(1193, 1200))


def test_training_again_gives_the_same(texts: list[str], bpe: Tokenizer):
    again = train_tokenizer(iter(texts), TokenizerConfig(vocab_size=1200))
    assert again.description == bpe.description


@pytest.mark.parametrize(("digits", "longest"), [("single", 1), ("pairs", 2), ("triples", 3), ("runs", 4)])
@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_digit_policy(texts: list[str], digits: str, longest: int, kind: str):
    corpus = [*texts, " 2024" * 50_000, " ".join(str(n) for n in range(1000, 9999))]
    tokenizer = train_tokenizer(corpus, TokenizerConfig(kind=kind, vocab_size=1000, digits=digits))
    pieces = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    found = max(len(piece) for piece in pieces if piece.isdigit())
    # The library's Unigram seeds only what two different words share, so that it misses the longest groups.
    assert found == longest or (kind == "unigram" and found == max(longest - 1, 1))


def test_indentation_is_one_token(bpe: Tokenizer):
    ids = bpe.encode("x:\n        return")
    assert [bpe.token_bytes(i) for i in ids][-2:] == [b"\n        ", b"return"]


def test_unknown_characters(trained: dict[str, Tokenizer], texts: list[str]):
    assert trained["bpe"].unk_id is None
    assert trained["unigram"].unk_id not in trained["unigram"].encode("語")
    without = train_tokenizer(texts, TokenizerConfig(kind="unigram", vocab_size=600, byte_fallback=False))
    assert without.unk_id in without.encode("語")
    assert trained["wordpiece"].unk_id in trained["wordpiece"].encode("語")


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_more_vocabulary_than_the_corpus_supports(kind: str):
    with pytest.raises(UserError, match=r"possible; use vocab_size=(\d+) or less") as error:
        train_tokenizer(["a small corpus, a small corpus"] * 3, TokenizerConfig(kind=kind, vocab_size=5000))
    size = int(str(error.value).split("use vocab_size=")[1].split()[0])
    again = train_tokenizer(["a small corpus, a small corpus"] * 3, TokenizerConfig(kind=kind, vocab_size=size))
    assert again.vocab_size == size


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
@pytest.mark.parametrize("corpus", [[], ["", ""]])
def test_an_empty_corpus(kind: str, corpus: list[str]):
    with pytest.raises(UserError, match="empty"):
        train_tokenizer(corpus, TokenizerConfig(kind=kind, vocab_size=400))


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_too_small_a_vocabulary(kind: str):
    with pytest.raises(UserError, match="at least"):
        train_tokenizer(["text"], TokenizerConfig(kind=kind, vocab_size=8))


def test_options_that_do_nothing_are_refused():
    with pytest.raises(ValidationError, match="unigram"):
        TokenizerConfig(kind="bpe", byte_fallback=True)
    with pytest.raises(ValidationError, match="min_frequency"):
        TokenizerConfig(kind="unigram", min_frequency=5)
    with pytest.raises(ValidationError):
        TokenizerConfig(vocab_size=-1)


def test_one_huge_line_and_one_token():
    tokenizer = train_tokenizer(["ab cd " * 300_000], TokenizerConfig(vocab_size=267))
    assert tokenizer.vocab_size == 267 and tokenizer.decode(tokenizer.encode("x")) == "x"
