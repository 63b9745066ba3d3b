"""Streaming: the same text as generate, whole characters, and nothing of a stop string."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headspring.artifacts import UserError
from headspring.inference import LanguageModel
from headspring.inference.text_stream import TextStream

from .tiny import tiny_model


class Letters:
    """A stand-in for a tokenizer whose tokens are the given strings."""

    def __init__(self, *tokens: str):
        self.tokens = tokens

    def stream(self):
        return self

    def push(self, token: int) -> str:
        return self.tokens[token]

    def finish(self) -> str:
        return ""


def feed(stop: tuple[str, ...], *tokens: str) -> tuple[list[str], TextStream]:
    stream = TextStream(Letters(*tokens), stop)
    pieces = []
    for token in range(len(tokens)):
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream


def test_an_end_that_may_become_a_stop_string_is_held_back():
    pieces, stream = feed(("\n\n", "END"), "a\n", "b E", "N", "Dx")
    assert pieces == ["a", "\nb ", "", "", ""]
    assert stream.stopped and stream.text == "a\nb "


def test_what_was_held_back_comes_at_the_end():
    pieces, stream = feed(("END",), "x", "EN")
    assert pieces == ["x", "", "EN"] and not stream.stopped


def test_the_first_stop_string_wins():
    assert feed(("cd", "b"), "abcd")[1].text == "a"


@given(
    text=st.text("ab\n", max_size=30),
    cuts=st.lists(st.integers(1, 4), max_size=30),
    stop=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
def test_any_cut_of_the_text_gives_what_lies_before_the_first_stop_string(text, cuts, stop):
    tokens, rest = [], text
    for cut in [*cuts, len(text) + 1]:
        tokens.append(rest[:cut])
        rest = rest[cut:]
    ends = {end for piece in range(len(tokens)) for end in [len("".join(tokens[: piece + 1]))]}
    # A stop string is noticed at the first token that completes one; the earliest one in the text so far counts.
    expected = text
    for end in sorted(ends):
        found = [place for place in (text[:end].find(one) for one in stop) if place >= 0]
        if found:
            expected = text[: min(found)]
            break
    pieces, stream = feed(tuple(stop), *tokens)
    assert "".join(pieces) == stream.text == expected


@pytest.mark.parametrize("prompt", ["def", "日本", "🙂", "the quick"])
@pytest.mark.parametrize("seed", range(4))
def test_streaming_is_not_streaming(lm, prompt, seed):
    """Random weights write broken UTF-8 all the time, so this is the hard case."""
    options = {"max_tokens": 40, "seed": seed, "stop": ["e", "or ", "\n"] if seed % 2 else []}
    pieces = list(lm.stream(prompt, **options))
    answer = lm.generate(prompt, **options)[0]
    assert "".join(pieces) == answer.text
    assert all(pieces)
    assert not any(stop in answer.text for stop in options["stop"])


def scripted(tokenizer, text: str) -> tuple[LanguageModel, list[int]]:
    """A model whose weights say: after token i of `text`, token i + 1; and `text` has no token twice."""
    ids = tokenizer.encode(text)
    assert len(set(ids)) == len(ids)
    model = tiny_model(tokenizer.vocab_size, width=512, tied=False)
    with torch.no_grad():
        model.embed.weight.copy_(torch.nn.functional.one_hot(torch.arange(tokenizer.vocab_size), 512) * 50.0)
        for block in model.layers:
            block.mixer.f.out.weight.zero_()
            block.feedforward.f.out.weight.zero_()
        model.head.weight.zero_()
        for before, after in itertools.pairwise(ids):
            model.head.weight[after, before] = 1.0
    return LanguageModel(model, tokenizer), ids


def test_a_character_of_many_tokens_comes_in_one_piece(tokenizer):
    lm, ids = scripted(tokenizer, "a鶴!")
    pieces = list(lm.stream(ids[:1], max_tokens=len(ids) - 1, temperature=0.0))
    assert len(ids) > 4 and pieces == ["鶴", "!"]
    cut = lm.generate(ids[:1], max_tokens=2, temperature=0.0)[0]
    assert cut.text == "�" and cut.finish_reason == "length"


def test_a_stop_string_ends_the_answer_before_it(tokenizer):
    lm, ids = scripted(tokenizer, "xyz;qj")
    answer = lm.generate(ids[:1], max_tokens=5, temperature=0.0, stop=";q")[0]
    assert (answer.text, answer.finish_reason) == ("yz", "stop")
    assert answer.token_ids == ids[1:5]  # up to the token that completed the stop string
    assert list(lm.stream(ids[:1], max_tokens=5, temperature=0.0, stop=";q")) == ["y", "z"]
    late = lm.generate(ids[:1], max_tokens=5, temperature=0.0, stop=["y", ";q"], min_tokens=2)[0]
    assert late.text == "yz"


def test_a_stream_can_be_left(lm):
    stream = lm.stream("the", max_tokens=50, seed=1)
    next(stream)
    stream.close()
    assert lm.generate("the", max_tokens=3, seed=1)[0].token_ids


@pytest.mark.parametrize("options", [{"n": 2}, {"logprobs": 1}])
def test_what_a_stream_cannot_say_is_refused(lm, options):
    with pytest.raises(UserError, match="use generate"):
        next(lm.stream("x", **options))
