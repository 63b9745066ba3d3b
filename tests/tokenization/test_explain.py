"""Explanations end at the tokens the production path gives."""

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import models

from headspring.artifacts import UserError
from headspring.tokenization import Tokenizer, TokenizerConfig, train_tokenizer
from headspring.tokenization.explain import explain


def show(explanation) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(explanation)
    return console.export_text()


def test_cryptocurrency(bpe: Tokenizer):
    explanation = explain(bpe, "cryptocurrency")
    (word,) = explanation.words
    assert word.steps[0].pieces == list("cryptocurrency")
    assert [len(step.pieces) for step in word.steps] == list(range(14, 14 - len(word.steps), -1))
    ranks = [step.score for step in word.steps[1:]]
    assert None not in ranks and explanation.agrees
    assert word.steps[-1].pieces == [view.token for view in explanation.tokens]
    assert bytes.fromhex("".join(view.bytes for view in explanation.tokens)) == b"cryptocurrency"
    text = show(explanation)
    assert "cryptocurrency" in text and explanation.tokens[0].bytes in text


@settings(deadline=None, max_examples=80)
@given(text=st.text(st.sampled_from("abcdefgh _(1\né語🙂<>|x"), max_size=30))
def test_steps_lead_to_the_tokens(trained: dict[str, Tokenizer], text: str):
    for tokenizer in trained.values():
        explanation = explain(tokenizer, text)
        assert explanation.agrees, (tokenizer, text)
        json.dumps(explanation.to_json())


def test_unigram_without_bytes(texts: list[str]):
    tokenizer = train_tokenizer(texts, TokenizerConfig(kind="unigram", vocab_size=500, byte_fallback=False))
    explanation = explain(tokenizer, "x語語 y")
    assert explanation.agrees and "<unk>" in explanation.words[0].pieces


def test_unigram_shows_lattice_and_path(trained: dict[str, Tokenizer]):
    explanation = explain(trained["unigram"], "argument")
    (word,) = explanation.words
    assert {edge.piece for edge in word.lattice} > set("argument")
    assert word.log_prob == pytest.approx(word.steps[-1].score)
    assert "also considered" in show(explanation)


def test_wordpiece_shows_rest_and_unknown(trained: dict[str, Tokenizer]):
    explanation = explain(trained["wordpiece"], "argumentx 語")
    assert "rest ''" in explanation.words[0].steps[-1].action
    assert "unknown" in explanation.words[1].steps[0].action
    assert "longest match" in show(explanation)


def test_a_story_that_is_not_true_is_marked(bpe: Tokenizer):
    library = LibraryTokenizer.from_str(bpe.library.to_str())
    library.add_tokens(["crypto"])
    assert not explain(Tokenizer(library), "cryptocurrency").agrees


def test_word_level_has_no_steps():
    library = LibraryTokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    with pytest.raises(UserError, match="no steps"):
        explain(Tokenizer(library), "a")
