"""Structured output: answers that end by themselves match, nothing else is let through, and nobody can make it expensive."""

import json
import random
import re
import time

import numpy as np
import pytest

from headspring.artifacts import HeadspringError, UserError
from headspring.inference import LanguageModel
from headspring.inference.sampling import SamplingParams
from headspring.inference.structured import LONGEST_NUMBER, Matcher, Structured, compile_structured, words_of
from headspring.inference.structured_budget import Budget, written_out
from headspring.tokenization.train import TokenizerConfig, train_tokenizer
from tests.inference.engine.stepping import request, run
from tests.inference.tiny import tiny_model

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
LARK = """start: sum
sum: NUMBER ("+" NUMBER){0,3}
NUMBER: /[0-9]{1,3}/"""


def is_person(text: str) -> bool:
    found = json.loads(text)
    return set(found) == {"name", "age"} and len(found["name"]) <= 5 and isinstance(found["age"], int)


KINDS = {
    "json": ({"json_schema": PERSON}, is_person),
    "json text": ({"json_schema": json.dumps(PERSON)}, is_person),
    "regex": ({"regex": r"[a-z]{2,5}(-日本)?"}, lambda text: re.fullmatch(r"[a-z]{2,5}(-日本)?", text)),
    "choice": ({"choice": ["yes", "no", 'may"be\n', "日本"]}, lambda text: text in ("yes", "no", 'may"be\n', "日本")),
    "grammar": ({"grammar": LARK}, lambda text: re.fullmatch(r"[0-9]{1,3}(\+[0-9]{1,3}){0,3}", text)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_ends_by_itself_matches(lm, kind):
    spec, matches = KINDS[kind]
    answers = run(lm, [request(lm, "the", seed=seed, max_tokens=60, structured=spec) for seed in range(12)])
    ended = [answer.text for answer in answers if answer.finish_reason == "stop"]
    assert ended and all(matches(text) for text in ended)
    assert all(answer.token_ids[-1] in (lm.tokenizer.eos_id, lm.tokenizer.end_id) for answer in answers if answer.text in ended)
    free = run(lm, [request(lm, "the", seed=seed, max_tokens=60) for seed in range(4)])
    assert not any(_safely(matches, answer.text) for answer in free)  # the control


def _safely(matches, text: str) -> bool:
    try:
        return bool(matches(text))
    except Exception:
        return False


def test_cut_by_max_tokens_says_so(lm):
    (answer,) = run(lm, [request(lm, "the", seed=1, max_tokens=2, structured={"regex": "[a-z]{40}"})])
    assert answer.finish_reason == "length"


FAMILIES = {
    "bpe": TokenizerConfig(vocab_size=300),
    "unigram": TokenizerConfig(kind="unigram", vocab_size=315),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_any_tokenizer_that_spells_its_spaces(family):
    text = [*("the quick brown fox jumps over the lazy dog\n", '{"name": "bob", "age": 12}') * 3]
    tokenizer = train_tokenizer(text, FAMILIES[family])
    own = LanguageModel(tiny_model(tokenizer.vocab_size), tokenizer)
    for spec, matches in KINDS.values():
        for answer in run(own, [request(own, "the", seed=seed, max_tokens=90, structured=spec) for seed in range(4)]):
            assert answer.finish_reason == "length" or matches(answer.text), answer.text


def test_a_vocabulary_without_spaces_is_refused():
    tokenizer = train_tokenizer(["the quick brown fox"], TokenizerConfig(kind="wordpiece", vocab_size=34))
    with pytest.raises(UserError, match="spell their spaces"):
        compile_structured(Structured(choice=("a",)), tokenizer)


def test_control_tokens_match_nothing(lm):
    """llguidance's notation can name tokens by id: a client must not write the conversation's frame with it."""
    control = lm.tokenizer.control["<|user|>"]
    for grammar in (f"start: <[{control}]>", "start: <|user|>"):
        with pytest.raises(UserError):
            compile_structured(Structured(grammar=grammar), lm.tokenizer)
    matcher = compile_structured(Structured(grammar=f'start: <[{control}]> "a" | "b"'), lm.tokenizer).matcher()
    assert not matcher.mask()[control]
    matcher = compile_structured(Structured(regex=r"(?s:.*)"), lm.tokenizer).matcher()
    allowed = set(np.flatnonzero(matcher.mask()).tolist())
    assert allowed & lm.tokenizer.control_ids == {lm.tokenizer.eos_id, lm.tokenizer.end_id}


def test_going_back_and_forking(lm):
    """A random walk with steps back equals one that never went astray."""
    chooser, compiled = random.Random(3), compile_structured(Structured(json_schema=PERSON), lm.tokenizer)
    matcher, taken = compiled.matcher(), []
    for _ in range(120):
        if taken and chooser.random() < 0.4:
            count = chooser.randint(1, len(taken))
            matcher.rollback(count)
            del taken[-count:]
        else:
            token = chooser.choice(np.flatnonzero(matcher.mask()).tolist())
            if token in (lm.tokenizer.eos_id, lm.tokenizer.end_id):
                continue
            matcher.accept(token)
            taken.append(token)
        straight = compiled.matcher()
        for token in taken:
            straight.accept(token)
        assert np.array_equal(matcher.mask(), straight.mask()) and matcher.complete == straight.complete
        other = matcher.fork()
        other.accept(int(np.flatnonzero(other.mask())[0]))
        assert np.array_equal(matcher.mask(), straight.mask())


def test_masks_of_proposals_leave_the_matcher_where_it_is(lm):
    matcher = compile_structured(Structured(choice=("the fox", "the dog")), lm.tokenizer).matcher()
    tokens, before = lm.tokenizer.encode("the fox"), matcher.mask()
    masks = matcher.masks([*tokens, lm.tokenizer.end_id, 5])
    assert len(masks) == len(tokens) + 1 and masks[-1][lm.tokenizer.end_id]
    assert len(matcher.masks([tokens[0], lm.tokenizer.control["<|pad|>"], tokens[1]])) == 2
    assert np.array_equal(matcher.mask(), before)


def test_a_token_that_does_not_match_fails(lm):
    matcher = compile_structured(Structured(choice=("yes",)), lm.tokenizer).matcher()
    with pytest.raises(HeadspringError):
        matcher.accept(lm.tokenizer.encode("n")[0])


def test_a_grammar_that_means_too_much_fails_before_it_is_slow(lm):
    """In `s: s s s | s s | "a"` the ways to read a text grow with the square of its length, and a step's work with them."""
    matcher = compile_structured(Structured(grammar='start: s\ns: s s s | s s | "a" |'), lm.tokenizer).matcher()
    slowest, letter = 0.0, lm.tokenizer.encode("a")[0]
    with pytest.raises(HeadspringError, match="items"):
        for _ in range(500):
            started = time.process_time()
            assert matcher.mask()[letter]
            matcher.accept(letter)
            slowest = max(slowest, time.process_time() - started)
    assert slowest < 1


# ---- floods


def longest(pattern: str, text: str) -> int:
    return max(map(len, re.findall(pattern, text)), default=0)


@pytest.mark.parametrize("schema", [{}, {"type": "number"}, {"type": "array", "items": {"type": "integer"}}], ids=str)
def test_numbers_and_spaces_end(lm, schema):
    """A model that wants nothing but digits, spaces and newlines, inside JSON."""
    bias = {token: 60.0 for text in "0123456789 \n.e-[" for token in lm.tokenizer.encode(text)}
    for seed in range(4):
        spec = {"seed": seed, "structured": {"json_schema": schema}, "logit_bias": bias, "max_tokens": 90, "temperature": 3.0}
        (answer,) = run(lm, [request(lm, "the", **spec)])
        assert longest(r"[0-9.eE+-]+", answer.text) <= LONGEST_NUMBER + 8
        assert longest(r"\s+", answer.text) <= 33


def test_digits_in_a_string_are_free(lm):
    matcher = compile_structured(Structured(json_schema={"type": "string"}), lm.tokenizer).matcher()
    digit = lm.tokenizer.encode("7")[0]
    matcher.accept(lm.tokenizer.encode('"')[0])
    for _ in range(3 * LONGEST_NUMBER):
        assert matcher.mask()[digit]
        matcher.accept(digit)


# ---- refused


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"regex": "("}, "regex"),
        ({"regex": r"(a)\1"}, "back"),
        ({"grammar": "start: foo"}, "foo"),
        ({"grammar": "nonsense"}, "cannot be compiled"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json_schema": {"type": "string", "format": "foo"}}, "foo"),
        ({"json_schema": {"type": "strin"}}, "strin"),
        ({"json_schema": {"$ref": "http://127.0.0.1:9/x.json"}}, "retriev"),
        ({"json_schema": {"$ref": "file:///etc/passwd"}}, "retriev"),
        ({"json_schema": {"allOf": [{"type": "string"}, {"type": "integer"}]}}, "unsatisfiable"),
        ({"json_schema": {"type": "string", "pattern": "^(?=a)b$"}}, "look"),
        ({"json_schema": {"not": {}, "x-guidance": {"lenient": True}}}, "not"),
    ],
    ids=str,
)
def test_what_cannot_be_compiled_is_refused_in_one_line(lm, spec, says):
    with pytest.raises(UserError) as caught:
        compile_structured(Structured(**spec), lm.tokenizer)
    assert says.lower() in str(caught.value).lower() and "\n" not in str(caught.value)


def nested(depth: int) -> dict:
    schema: dict = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "spec",
    [
        {"json_schema": nested(40)},
        {"json_schema": {"enum": [f"x{i}" for i in range(9000)]}},
        {"json_schema": {"type": "string", "pattern": "a" * 70_000}},
        {"regex": "(" * 60_000 + ")" * 60_000},
        {"regex": "a" * 70_000},
        {"regex": "(a{1000}){1000}"},
        {"json_schema": {"type": "array", "items": {"type": "string", "pattern": "^([ab]{1,900}c{2}){500,}$"}}},
        {"grammar": "start: /((a{99}){99}){99}/"},
        {"regex": "(" * 40 + "a" + ")" * 40},
        {"grammar": "start: " + "(" * 60_000},
        {"choice": tuple(f"choice {i}" for i in range(9000))},
    ],
    ids=lambda spec: next(iter(spec)),
)
def test_budgets(lm, spec):
    started = time.monotonic()
    with pytest.raises(UserError):
        compile_structured(Structured(**spec), lm.tokenizer, Budget(seconds=0.5))
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    ("pattern", "size"),
    [
        ("abc", 3),
        ("(ab){3}c", 7),
        ("((ab){2,3}c){10}", 70),
        (r"\{3}[(){9}]{4}a{2", 3 + 7 + 3 + 3),
        ("a{5,}", 5),
        ("(" * 50_000, 0),
        ("[" * 50_000, 50_000),
        (")" * 9, 9),
    ],
)
def test_patterns_written_out(pattern, size):
    assert written_out(pattern) == size


def test_a_deep_schema_in_text_is_refused_before_it_is_parsed():
    with pytest.raises(UserError, match="levels"):
        SamplingParams.of(structured={"json_schema": "[" * 100_000})


@pytest.mark.parametrize(
    "options",
    [
        {"structured": {}},
        {"structured": {"regex": "a", "choice": ["b"]}},
        {"structured": {"choice": []}},
        {"structured": {"regex": "a"}, "ignore_eos": True},
        {"structured": {"regex": "a"}, "min_tokens": 2},
        {"structured": {"json_schema": "{"}},
        {"structured": {"xml": "a"}},
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(options):
    with pytest.raises(UserError) as caught:
        SamplingParams.of(**options)
    assert "\n" not in str(caught.value)


def test_compiled_once(lm, monkeypatch):
    spec = Structured(regex="once[0-9]")
    assert compile_structured(spec, lm.tokenizer) is compile_structured(Structured(regex="once[0-9]"), lm.tokenizer)
    assert words_of(lm.tokenizer) is words_of(lm.tokenizer) and isinstance(
        compile_structured(spec, lm.tokenizer).matcher(), Matcher
    )
