"""Speculation changes no token, whatever proposes and whatever else is asked of the answer."""

from typing import Literal

import pytest
import torch

from headspring.artifacts import UserError
from headspring.inference import LanguageModel
from headspring.inference.engine import Engine
from headspring.inference.engine.config import EngineConfig
from headspring.inference.engine.sampler import Sampler
from headspring.inference.sampling import SamplingParams
from headspring.inference.speculation import Draft, EarlyExit, MultiToken, PromptLookup, Speculation, Speculator
from headspring.inference.speculation.lookup import Index
from headspring.models import Attention, Block, Headed, Mamba2, SwiGLU, repeat
from headspring.models.heads import MultiToken as MultiTokenHead
from headspring.tokenization.train import TokenizerConfig, train_tokenizer
from tests.inference.tiny import TEXT, tiny_decoder, tiny_model

PROMPTS = ("the quick brown fox the quick", "def add(a, b): return", "日本")

OPTIONS = {
    "greedy": {"temperature": 0},
    "sampled": {"seed": 3},
    "filters": {"seed": 3, "temperature": 1.4, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "penalties": {"seed": 4, "repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.4},
    "bias": {"temperature": 0, "logit_bias": {101: 6.0, 102: -100}},
    "log-probabilities": {"temperature": 0, "logprobs": 3, "prompt_logprobs": 1},
    "every log-probability": {"seed": 9, "logprobs": -1},
    "stop strings": {"temperature": 0, "stop": ("e", "日"), "min_tokens": 3},
    "stop ids": {"seed": 5, "stop_token_ids": tuple(range(100, 140)), "min_tokens": 2},
    "several": {"seed": 6, "n": 3},
    "best of": {"seed": 6, "n": 1, "best_of": 3},
    "regex": {"seed": 7, "structured": {"regex": "[a-z ]{5,12}"}},
    "json, several": {"seed": 8, "n": 2, "structured": {"json_schema": {"type": "array", "items": {"type": "integer"}}}},
    "short": {"seed": 2, "max_tokens": 2},
}


class Wrong(Speculation):
    """Proposes nonsense, control tokens, and more than it was asked for."""

    kind: Literal["wrong"] = "wrong"  # type: ignore[assignment]

    def proposer(self, model, tokenizer):
        class Proposer:
            def propose(self, requests, limits):
                starts = [7 * len(request.token_ids) for request in requests]
                ranges = [range(start, start + limit + 3) for start, limit in zip(starts, limits)]
                return [[token % tokenizer.vocab_size for token in tokens] for tokens in ranges]

            def observe(self, request, hidden):
                pass

        return Proposer()


class Raises(Speculation):
    kind: Literal["raises"] = "raises"  # type: ignore[assignment]

    def proposer(self, model, tokenizer):
        class Proposer:
            def propose(self, requests, limits):
                raise RuntimeError("no idea")

            def observe(self, request, hidden):
                pass

        return Proposer()


@pytest.fixture(scope="module")
def headed(tokenizer) -> LanguageModel:
    block = Block(mixer=Attention(heads=4), feedforward=SwiGLU(hidden=32))
    value = Headed(body=tiny_decoder(tokenizer.vocab_size), heads={"ahead": MultiTokenHead(ahead=2, block=block)})
    model = value.build(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3)
    return LanguageModel(model, tokenizer)


@pytest.fixture(scope="module")
def recurrent(tokenizer) -> LanguageModel:
    mamba = Block(mixer=Mamba2(head_dim=16, state=8), feedforward=SwiGLU(hidden=32))
    return LanguageModel(tiny_model(tokenizer.vocab_size, layers=repeat(2, mamba)), tokenizer)


@pytest.fixture(scope="module")
def draft_folder(tokenizer, tmp_path_factory):
    """A model that has much in common with the tiny one: the same weights, a little disturbed."""
    model, folder = tiny_model(tokenizer.vocab_size), tmp_path_factory.mktemp("draft")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.005 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    LanguageModel(model, tokenizer).save(folder)
    return str(folder)


def answers(lm: LanguageModel, value: Speculation | None, prompts=PROMPTS, **options):
    """Tokens, texts, log-probabilities and reasons of all answers; and the engine."""
    engine = Engine(lm.model, lm.tokenizer, EngineConfig(speculation=value, debug=True))
    if engine.speculator is not None:  # timing must not decide what is tested
        engine.speculator.controller.of = lambda answers: Always()
    jobs = [engine.submit(lm.prompt_ids(text), SamplingParams.of(**{"max_tokens": 14, **options})) for text in prompts]
    engine.run()
    assert all(job.outcome == "finished" for job in jobs), [job.error for job in jobs]
    return [answer for job in jobs for answer in job.generations], engine


class Always:
    way = True

    def note(self, *_):
        pass


def assert_equal(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        for top, other_top in zip(one.top_logprobs or (), other.top_logprobs or (), strict=True):
            assert dict(top) == pytest.approx(dict(other_top), abs=1e-4)


VALUES = {
    "prompt lookup": PromptLookup(shortest=1),
    "early exit": EarlyExit(layers=1),
    "the whole model": EarlyExit(layers=2, tokens=7),
    "wrong": Wrong(tokens=5),
    "raises": Raises(tokens=5),
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("value", VALUES)
def test_the_same_answers(lm, value, options):
    expected, plain = answers(lm, None, **OPTIONS[options])
    found, engine = answers(lm, VALUES[value], **OPTIONS[options])
    assert_equal(found, expected)
    if value == "the whole model":  # the control: proposals are made, and taken
        assert options == "short" or engine.stats().steps <= 0.7 * plain.stats().steps
    if value == "raises":
        assert engine.speculator.proposed == 0


@pytest.mark.parametrize("options", ["greedy", "sampled", "penalties", "regex"])
def test_a_draft_model(lm, draft_folder, options):
    expected, plain = answers(lm, None, **OPTIONS[options])
    found, engine = answers(lm, Draft(model=draft_folder), **OPTIONS[options])
    assert_equal(found, expected)
    # Coupled by the uniform numbers, a draft that is nearly the model is often right at temperature 1 too, flat as this one is.
    assert engine.speculator.accepted > 0.2 * engine.speculator.proposed > 3
    counted, nothing = engine.stats(), plain.stats()
    assert (counted.proposed, counted.accepted) == (engine.speculator.proposed, engine.speculator.accepted)
    assert nothing.proposed == nothing.accepted == nothing.speculation_off == 0 and counted.steps < nothing.steps


@pytest.mark.parametrize("options", ["greedy", "sampled", "several"])
def test_heads_of_the_model(headed, options):
    expected, _ = answers(headed, None, **OPTIONS[options])
    found, engine = answers(headed, MultiToken(window=8), **OPTIONS[options])
    assert_equal(found, expected)
    assert engine.speculator.proposed > 10


def test_a_head_that_is_trained_is_right(headed):
    """The heads' proposals are what the heads say: for a greedy answer, those of `HeadedModule.draft`."""
    found, engine = answers(headed, MultiToken(window=96), prompts=PROMPTS[:1], temperature=0, max_tokens=2)
    prompt, tokens = headed.prompt_ids(PROMPTS[0]), found[0].token_ids
    read = torch.tensor([[*prompt, tokens[0]]])
    drafted = headed.model.draft(read[:, :-1], headed.model(read[:, :-1]))[0].tolist()
    assert drafted[0] == tokens[0]
    proposer = engine.speculator.proposer
    job = engine.submit(prompt, SamplingParams(temperature=0, max_tokens=8))
    engine.step()
    proposer._hidden[job.requests[0]] = len(prompt), headed.model(read[:, :-1])[0]
    assert proposer.propose(job.requests, [2]) == [drafted[1:]]


@pytest.mark.parametrize(
    "value", [PromptLookup(shortest=1), EarlyExit(layers=1), EarlyExit(layers=2), Wrong(tokens=5)], ids=str
)
@pytest.mark.parametrize("options", ["greedy", "sampled"])
def test_models_that_fold_what_they_read(recurrent, value, options):
    """A recurrent state cannot be shortened: it goes back to a copy and reads again."""
    expected, _ = answers(recurrent, None, **OPTIONS[options])
    found, _ = answers(recurrent, value, **OPTIONS[options])
    assert_equal(found, expected)


def test_in_small_chunks_and_few_pages(lm):
    expected, _ = answers(lm, None, **OPTIONS["sampled"])
    config = EngineConfig(chunk=4, max_sequences=3, speculation=EarlyExit(layers=2), debug=True)
    engine = Engine(lm.model, lm.tokenizer, config)
    jobs = [engine.submit(lm.prompt_ids(text), SamplingParams.of(max_tokens=14, **OPTIONS["sampled"])) for text in PROMPTS]
    engine.run()
    assert_equal([job.generations[0] for job in jobs], expected)


class TakesAll(Sampler):
    """The planted bug: proposals are taken as they are."""

    def _choose(self, requests, logits, proposed, starts, failures):
        ids = super()._choose(requests, logits, proposed, starts, failures)
        for start, tokens in zip(starts, proposed):
            ids[start : start + len(tokens)] = tokens
        return ids


def test_a_sampler_that_believes_proposals_is_found_out(lm, monkeypatch):
    expected, _ = answers(lm, None, **OPTIONS["greedy"])
    monkeypatch.setattr("headspring.inference.engine.answering.Sampler", TakesAll)
    found, _ = answers(lm, EarlyExit(layers=1), **OPTIONS["greedy"])
    with pytest.raises(AssertionError):
        assert_equal(found, expected)


# ---- proposers by themselves


def test_lookup_finds_the_longest_and_latest_run():
    index = Index(longest=3, shortest=1)
    index.grow([1, 2, 3, 9, 5, 3, 8, 1, 2, 3])
    assert index.after(2) == [9, 5]  # (1, 2, 3) stood there before; (3) alone also before the 8
    index.grow([7, 3])
    assert index.after(9) == [7, 3]
    index.grow([4])
    assert index.after(3) == []


def test_proposals_shrink_where_they_are_wrong(lm):
    _, engine = answers(lm, Wrong(tokens=8), prompts=PROMPTS[:1], temperature=0, max_tokens=40)
    assert engine.speculator.accepted < 10
    assert engine.speculator.proposed < 70  # and not 8 a step


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (EarlyExit(layers=7), "layer 7"),
        (MultiToken(), "MultiToken"),
        (Draft(model="/nowhere"), "nowhere"),
    ],
    ids=str,
)
def test_a_model_without_what_it_needs_is_refused(lm, value, says):
    with pytest.raises(UserError) as caught:
        Engine(lm.model, lm.tokenizer, EngineConfig(speculation=value))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_draft_with_another_tokenizer_is_refused(lm, tmp_path):
    other = train_tokenizer([*TEXT, "zzzz zzzz"], TokenizerConfig(vocab_size=299))
    LanguageModel(tiny_model(other.vocab_size), other).save(tmp_path)
    with pytest.raises(UserError, match="another tokenizer"):
        Speculator(Draft(model=str(tmp_path)), lm.model, lm.tokenizer, lambda: 0.0)
