"""The fast engine gives the library's ids on every text, and is not used where it would not."""

import copy
import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer

from headspring.artifacts import UserError
from headspring.tokenization import Tokenizer, TokenizerConfig, train_tokenizer
from headspring.tokenization.ranks import rank_encoder

pytest.importorskip("tiktoken")
SAMPLES = [
    "",
    "a",
    "def f(x):\n    return x  # 1234567\n",
    "Straße 🙂 naïve\r\n\t\t日本語",
    "<|end|><|user|>",
    " " * 50 + "x\n\n\n",
]


def both(tokenizer: Tokenizer, texts: list[str]) -> tuple[list[list[int]], list[list[int]]]:
    assert tokenizer._ranks is not None
    return tokenizer.encode_batch(texts), tokenizer._encode_with_library(texts)


def test_the_ids_are_the_librarys(bpe, texts):
    fast, slow = both(bpe, [*texts, *SAMPLES])
    assert fast == slow


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), max_size=4))
@settings(max_examples=150, deadline=None)
def test_on_any_text(bpe, texts):
    fast, slow = both(bpe, texts)
    assert fast == slow


@given(
    st.lists(st.sampled_from(["self", " re", "turn", "'ll", "\n", "    ", "\t", "9", "12", "é", ".", "((", " "]), max_size=40)
)
@settings(max_examples=150, deadline=None)
def test_on_text_full_of_borders(bpe, pieces):
    fast, slow = both(bpe, ["".join(pieces)])
    assert fast == slow


@pytest.mark.parametrize("digits", ["single", "pairs", "triples", "runs"])
def test_every_digit_policy(texts, digits):
    tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=600, digits=digits))
    fast, slow = both(tokenizer, [*texts, "1 12 123 1234 12345 ٣٤٥"])
    assert fast == slow


@pytest.mark.slow
def test_both_regex_engines_sort_every_code_point_alike(bpe):
    points = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(points), 2048):
        texts = [f"a{c}b 1{c}2 .{c}. \n{c}x {c}{c}'{c} {c} y {c}\n {c}1" for c in points[start : start + 2048]]
        fast, slow = both(bpe, texts)
        assert fast == slow


def test_texts_that_are_not_for_it_go_to_the_library_in_their_place(bpe):
    texts = ["before", " " * 20_000 + "x", "after"]
    fast, slow = both(bpe, texts)
    assert fast == slow
    with pytest.raises(UserError, match="surrogates"):
        bpe.encode_batch(["fine", "\ud800"])
    with pytest.raises(TypeError, match="one string"):
        bpe.encode_batch("text")


def edited(tokenizer: Tokenizer, change) -> object:
    """What `rank_encoder` makes of a `tokenizer.json` that was changed by hand."""
    description = copy.deepcopy(tokenizer.description)
    change(description)
    return rank_encoder(description, LibraryTokenizer.from_str(json.dumps(description)), tokenizer.control)


def swap_merges(description):
    merges = description["model"]["merges"]
    merges[3], merges[200] = merges[200], merges[3]


def drop_a_merge(description):
    description["model"]["merges"].pop(5)


def add_an_unreachable_token(description):
    vocab, merges = description["model"]["vocab"], description["model"]["merges"]
    for token, parts in {"qzx": ("q", "zx"), "zx": ("z", "x")}.items():  # z·x is made after q·zx needs it
        vocab[token] = max(vocab.values()) + 1
        merges.append(list(parts))


CHANGES = {
    "merges out of order": swap_merges,
    "a token without its merge": drop_a_merge,
    "a part made after its whole": add_an_unreachable_token,
    "dropout": lambda description: description["model"].update(dropout=0.1),
    "another pattern": lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": r"\S+|\s+"}),
    "a normaliser": lambda description: description.update(normalizer={"type": "NFC"}),
    "a space before": lambda d: d["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_tokenizer_it_would_read_differently_stays_with_the_library(bpe, change):
    assert edited(bpe, lambda description: None) is not None
    assert edited(bpe, change) is None


def test_control_merges_out_of_order_would_give_other_ids(bpe, texts):
    """The planted bug: without the check, ranks say something else than the merges."""
    description = copy.deepcopy(bpe.description)
    swap_merges(description)
    library = LibraryTokenizer.from_str(json.dumps(description))
    slow = [encoding.ids for encoding in library.encode_batch(texts, add_special_tokens=False)]
    assert bpe.encode_batch(texts) != slow


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_other_families_stay_with_the_library(trained, kind):
    assert trained[kind]._ranks is None


def test_without_the_package_nothing_changes(bpe, texts, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    plain = Tokenizer(bpe.library)
    assert plain._ranks is None and plain.encode_batch(texts) == bpe.encode_batch(texts)
