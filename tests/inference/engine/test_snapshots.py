"""Prefixes of models with folded states: begun from a snapshot, whatever the schedule, to the same answers."""

import pytest
import torch

from headspring.inference import LanguageModel
from headspring.inference.engine import Engine, EngineConfig
from headspring.inference.engine import schedules as random_schedules
from headspring.inference.engine.beside import Beside
from headspring.inference.engine.cache import PAGE, Cache
from headspring.inference.engine.runner import SNAPSHOT_SHARE, RaggedRunner
from headspring.inference.engine.schedules import Schedule
from headspring.inference.sampling_params import SamplingParams
from headspring.inference.speculation import PromptLookup
from headspring.models import GRU, LSTM, Attention, Block, Causal, GatedDelta, Mamba2, SwiGLU

from ..reference_engine import ReferenceEngine
from ..tiny import tiny_model
from . import test_schedules as schedules

MIXERS = {
    "hybrid": (LSTM(), Attention(heads=4, kv_heads=2)),
    "folded": (GRU(), LSTM()),
    "windows": (Attention(heads=2, mask=Causal(window=9, sinks=2)), LSTM(), Attention(heads=2, mask=Causal(window=40))),
}
TEXT = list(range(100, 190))
SAME = {"temperature": 1.0, "max_tokens": 4, "seed": 3}


SLOW = {"matrices": (Mamba2(state=8, head_dim=16), GatedDelta(heads=2, head_dim=16))}


@pytest.fixture(scope="module", params=MIXERS)
def folded(request, tokenizer) -> LanguageModel:
    return made(tokenizer, request.param)


def made(tokenizer, name: str) -> LanguageModel:
    layers = tuple(Block(mixer=mixer, feedforward=SwiGLU(hidden=40)) for mixer in (MIXERS | SLOW)[name])
    return LanguageModel(tiny_model(tokenizer.vocab_size, layers=layers), tokenizer)


def engine_of(lm: LanguageModel, **options) -> Engine:
    return Engine(lm.model, lm.tokenizer, EngineConfig(**{"debug": True, "max_sequences": 4} | options))


def ask(engine: Engine, prompt: list[int], **options):
    before = engine.cache.hits
    job = engine.submit(prompt, SamplingParams(**SAME | options))
    engine.run()
    assert job.outcome == "finished", job.error
    return job.generations, engine.cache.hits - before


@pytest.mark.parametrize("name", MIXERS | SLOW)
def test_the_same_prompt_again_is_the_same_by_a_bit(tokenizer, name):
    """It is read in the same pieces: up to the last full page, where the snapshot is, and the rest."""
    engine = engine_of(made(tokenizer, name))
    first, hits = ask(engine, TEXT[:70], n=2)
    again, more = ask(engine, TEXT[:70], n=2)
    assert (hits, more) == (0, 2 * PAGE)
    assert [one.token_ids for one in again] == [one.token_ids for one in first]
    assert [one.logprobs for one in again] == [one.logprobs for one in first]


def test_eight_bits_and_a_snapshot(tokenizer):
    """Pages in int8 beside a folded state: the same again, by a bit, and near to what full pages give."""
    lm = made(tokenizer, "hybrid")
    engine, plain = engine_of(lm, cache_dtype="int8"), ask(engine_of(lm), TEXT[:70])[0][0]
    (first, _), (again, hits) = ask(engine, TEXT[:70]), ask(engine, TEXT[:70])
    assert hits == 2 * PAGE and first[0].logprobs == again[0].logprobs
    assert abs(first[0].logprobs[0] - plain.logprobs[0]) < 0.05


def test_a_third_prompt_begins_where_the_second_left_the_first(folded):
    """What two prompts have in common gets a snapshot when the second is read: nobody knew before that it would be wanted."""
    engine, reference = engine_of(folded), ReferenceEngine(folded)
    prompts = [TEXT[:80], TEXT[:40] + [5] * 33, TEXT[:50] + [6] * 20, [*TEXT[:80], 7]]
    hits = []
    for prompt in prompts:
        answers, hit = ask(engine, prompt)
        schedules.check(type("Job", (), {"generations": answers}), reference.answers(prompt, SamplingParams(**SAME)))
        hits.append(hit)
    assert hits == [0, 0, PAGE, 2 * PAGE]


def test_a_conversation_goes_on_from_its_last_prompt(folded):
    engine, text = engine_of(folded), TEXT[:45]
    for turn, expected in enumerate((0, PAGE, 2 * PAGE)):
        answers, hits = ask(engine, text)
        assert hits == expected
        text = text + answers[0].token_ids + [turn] * 16


def test_scopes_share_nothing(folded):
    engine = engine_of(folded)
    ask(engine, TEXT)
    job = engine.submit(TEXT, SamplingParams(**SAME), key="another client")
    engine.run()
    assert job.outcome == "finished" and engine.cache.hits == 0


def test_speculation_goes_back_to_the_same(folded):
    """Guesses of which the first is right and the second wrong, so that every step ends in a rewind."""
    options = {"max_tokens": 20, "ignore_eos": True}
    plain, _ = ask(engine_of(folded), TEXT[:70], **options)
    right = plain[0].token_ids

    class Guess:
        def propose(self, requests, limits):
            places = [len(request.token_ids) for request in requests]
            return [[*right[place : place + 1], 0][:limit] for place, limit in zip(places, limits, strict=True)]

        def observe(self, request, hidden):
            pass

    engine = engine_of(folded, speculation=PromptLookup())
    engine.speculator.proposer = Guess()
    for _ in range(2):
        answers, hits = ask(engine, TEXT[:70], **options)
        schedules.check(type("Job", (), {"generations": answers}), plain)
    assert hits == 2 * PAGE and 0 < engine.speculator.accepted < engine.speculator.proposed


@pytest.fixture(scope="module")
def hybrid(tokenizer) -> LanguageModel:
    return made(tokenizer, "hybrid")


@pytest.fixture(scope="module")
def expected(hybrid):
    answers, reference = {}, ReferenceEngine(hybrid)

    def of(*key: int):
        if key not in answers:
            prompt, setting, tokens = key
            answers[key] = reference.answers(schedules.PROMPTS[prompt], schedules.params_of(setting, tokens))
        return answers[key]

    return of


ROOM = 1.0001 * SNAPSHOT_SHARE / (SNAPSHOT_SHARE - 1)  # so much memory for pages and snapshots, in that of the pages


def test_every_schedule_gives_the_references_answers(hybrid, expected):
    counted = schedules.play_many(hybrid, expected, range(3), ROOM)
    assert counted["finished"] > 5 and counted["preempted"] > 0 and counted["hits"] >= PAGE


def test_without_room_for_snapshots_nothing_is_shared(folded):
    engine = engine_of(folded)
    engine.cache.snapshots.budget = 0
    assert [ask(engine, TEXT[:70])[1] for _ in range(2)] == [0, 0]


@pytest.mark.slow
def test_many_schedules_give_the_references_answers(hybrid, expected):
    counted = schedules.play_many(hybrid, expected, range(1000, 1200), ROOM)
    assert counted["hits"] > 10 * PAGE and counted["preempted"] > 10


def test_random_schedules_of_the_certificate_run_in_the_room_they_name(hybrid):
    """No more pages than the longest request needs, and snapshots beside them."""
    asked = [(TEXT[:length], SamplingParams(max_tokens=2, seed=length, ignore_eos=True)) for length in (40, 70, 80)]
    expected = [job.generations for job in random_schedules.play(hybrid, asked, Schedule())[0]]
    hits = 0
    for room in (1.0, None):
        schedule = Schedule(seed=1, chunk=33, max_sequences=4, sharing=True, room=room, turns=8)
        jobs, stats = random_schedules.play(hybrid, asked, schedule, debug=True)
        hits += stats.prefix_hits
        for job, answers in zip(jobs, expected, strict=True):
            schedules.check(job, answers)
    assert hits > 0


# ---- the room for them


def test_snapshots_stay_within_their_room(tokenizer):
    lm = made(tokenizer, "folded")
    size = RaggedRunner(lm.model, EngineConfig())._new_states(96).snapshot(0).bytes
    engine = engine_of(lm)
    engine.cache.snapshots.budget = 2 * size
    for first in range(5):
        ask(engine, [first] * 70)
    held = engine.cache.snapshots
    assert len(held.nodes) == 2 and held.bytes == 2 * size
    assert [ask(engine, [first] * 70)[1] for first in (4, 0)] == [2 * PAGE, 0]
    held.budget = size // 2
    assert ask(engine, [200] * 70)[1] == ask(engine, [200] * 70)[1] == 0 and not held.nodes


def test_pages_and_snapshots_share_one_memory(tokenizer):
    lm = made(tokenizer, "hybrid")
    plain = engine_of(lm, memory=2**18, prefix_sharing=False)
    shares = engine_of(lm, memory=2**18)
    page = sum(pages.bytes_per_page for pages in shares.runner.layers if pages is not None)
    assert shares.cache.total * page + shares.cache.snapshots.budget <= 2**18
    assert shares.cache.snapshots.budget == 2**15 and plain.cache.snapshots is None
    assert shares.cache.total <= plain.cache.total


def test_a_snapshot_goes_with_its_page(tokenizer):
    """An index of few pages: each prompt takes those of the one before."""
    engine = engine_of(made(tokenizer, "folded"), max_sequences=1)
    for first in range(12):
        ask(engine, [first] * 80)
    assert 0 < len(engine.cache.snapshots.nodes) <= engine.cache.total


# ---- planted bugs


def wrong_place(monkeypatch):
    """Every page gets the state that was kept first, wherever that was."""
    kept = []

    def snapshot(runner, sequence):
        kept.append(sequence.state.snapshot(sequence.computed))
        return kept[0]

    monkeypatch.setattr(RaggedRunner, "snapshot", snapshot)


def not_copied(monkeypatch):
    """Who begins with a snapshot goes on in it."""
    monkeypatch.setattr(Beside, "resumed", staticmethod(lambda snapshot, capacity: Beside(dict(snapshot.layers))))


def any_page_will_do(monkeypatch):
    """A prefix that ends where there is no snapshot begins with the last one before."""

    def match(cache, sequence):
        real(cache, sequence)
        if sequence.snapshot is None and (known := cache._known(sequence)) and cache.snapshots.nodes:
            sequence.tables, sequence.nodes = [[one.pages[0] for one in known]], [one.serial for one in known]
            sequence.computed = len(known) * PAGE
            sequence.snapshot = next(iter(cache.snapshots.nodes.values())).snapshot
            for page in sequence.tables[0]:
                cache.pools[0].hold(page)

    real = Cache.match
    monkeypatch.setattr(Cache, "match", match)


@pytest.mark.parametrize("plant", [wrong_place, not_copied, any_page_will_do])
@pytest.mark.parametrize("debug", [True, False])
def test_control_planted_bugs_are_noticed(tokenizer, monkeypatch, plant, debug):
    """By the books where they are checked, and by the answers anyway."""
    lm = made(tokenizer, "folded")
    prompts = [TEXT[:80], TEXT[:40] + [5] * 33, TEXT[:40] + [5] * 33, TEXT[:80], TEXT[:80]]
    alone = [ask(engine_of(lm, prefix_sharing=False), prompt)[0][0].logprobs for prompt in prompts]
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        engine = engine_of(lm, debug=debug)
        for prompt, expected in zip(prompts, alone, strict=True):
            got = ask(engine, prompt)[0][0].logprobs
            torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), atol=2e-4, rtol=1e-4)
