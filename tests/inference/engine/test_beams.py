"""Beam search against the obvious one without a cache, and against `transformers`, whose rules it follows."""

import itertools

import pytest
import torch

from headspring.inference import LanguageModel, SamplingParams
from headspring.inference.engine import Engine, EngineConfig
from headspring.inference.engine.beams import Search
from headspring.models import Attention, Block, SwiGLU, repeat

from ..reference_engine import ReferenceEngine
from ..tiny import tiny_model

PROMPT = [5, 6, 7, 90]
RULES = list(itertools.product((2, 3), (0.0, 1.0, 2.5), (True, False, "never")))
STOPS = (82, 50, 84, 151)  # that these models write, so that beams end at different lengths


def params(width: int, length_penalty: float, early_stopping: bool | str, **more) -> SamplingParams:
    rules = {"beam_width": width, "n": width, "length_penalty": length_penalty, "early_stopping": early_stopping}
    return SamplingParams(**{"max_tokens": 9, "stop_token_ids": STOPS, **rules, **more})


def answers_of(lm: LanguageModel, asked: list[SamplingParams], **options) -> list[list]:
    engine = Engine(lm.model, lm.tokenizer, EngineConfig(debug=True, **{"max_sequences": 6, "chunk": 6, **options}))
    jobs = [engine.submit(PROMPT, one) for one in asked]
    engine.run()
    assert engine.stats().pages_used == 0
    return [job.generations for job in jobs]


def check(answers, expected) -> None:
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
    assert [answer.finish_reason for answer in answers] == [answer.finish_reason for answer in expected]
    for answer, other in zip(answers, expected, strict=True):
        torch.testing.assert_close(torch.tensor(answer.logprobs), torch.tensor(other.logprobs), atol=1e-4, rtol=1e-4)


def test_beams_are_those_of_the_obvious_search(lm):
    reference, asked = ReferenceEngine(lm), [params(*rules) for rules in RULES]
    found = answers_of(lm, asked)
    for answers, one in zip(found, asked, strict=True):
        check(answers, reference.answers(PROMPT, one))
    assert len({len(answer.token_ids) for answers in found for answer in answers}) > 3


@pytest.mark.parametrize("max_sequences", [1, 2, 5])
def test_fewer_places_than_beams_change_nothing(lm, max_sequences):
    asked = [params(3, 1.0, False), params(3, 2.5, "never")]
    for answers, expected in zip(answers_of(lm, asked, max_sequences=max_sequences), answers_of(lm, asked), strict=True):
        check(answers, expected)


def test_control_totals_of_the_wrong_beam_are_noticed(lm, monkeypatch):
    take = Search.take

    def swapped(search, *arguments):
        take(search, *arguments)
        search.totals.reverse()

    asked = [params(3, 1.0, False, max_tokens=12, stop_token_ids=())]
    honest = answers_of(lm, asked)
    monkeypatch.setattr(Search, "take", swapped)
    assert answers_of(lm, asked) != honest


def test_beams_are_those_of_transformers(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    block = Block(mixer=Attention(heads=4, kv_heads=2, qk_norm=None), feedforward=SwiGLU(hidden=64))
    lm = LanguageModel(tiny_model(tokenizer.vocab_size, layers=repeat(2, block)), tokenizer)
    lm.save(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    lengths: set[int] = set()
    ends = sorted({*STOPS, tokenizer.eos_id, tokenizer.end_id})
    for rules in RULES:
        width, length_penalty, early_stopping = rules
        made = theirs.generate(
            torch.tensor([PROMPT]),
            attention_mask=torch.ones(1, len(PROMPT), dtype=torch.int64),
            num_beams=width,
            num_return_sequences=width,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            max_new_tokens=9,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=0,
        )
        ours = [answer.token_ids for answer in answers_of(lm, [params(*rules)])[0]]
        lengths.update(map(len, ours))
        assert [row[len(PROMPT) :].tolist()[: len(ids)] for row, ids in zip(made, ours, strict=True)] == ours
    assert len(lengths) > 3
