"""Random schedules: the same requests under other chunks, pages, company, forks, threads, order and speculation.

A schedule decides everything that must not matter. `play` lets an engine live through one: requests arrive between steps in a
random order and with random priorities, and others that nobody waits for arrive too and are cancelled on the way. What must
come out is the same tokens with the same log-probabilities, bit for bit; `certificate` and the tests compare.
"""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from headspring.inference.engine.cache import Group
from headspring.inference.engine.config import EngineConfig
from headspring.inference.engine.engine import Engine, Statistics
from headspring.inference.engine.job import Job
from headspring.inference.engine.runner import SNAPSHOT_SHARE
from headspring.inference.language_model import LanguageModel
from headspring.inference.sampling_params import SamplingParams
from headspring.inference.speculation import PromptLookup
from headspring.models.model import ModelModule
from headspring.models.stack import StackModule

Asked = tuple[list[int], SamplingParams]  # a prompt and what is wanted of it


@dataclass(frozen=True)
class Schedule:
    """`room`: pages, in multiples of what the longest request needs alone (None: plenty). `nuisance`: requests that are
    cancelled on the way. `turns`: how many steps may pass between two arrivals."""

    seed: int = 0
    chunk: int = 512
    max_sequences: int = 1
    room: float | None = None
    sharing: bool = False
    speculates: bool = False
    threads: int = 1
    nuisance: int = 0
    turns: int = 0

    @staticmethod
    def random(seed: int, threads: int = 2) -> "Schedule":
        """Every choice made at random."""
        draw = random.Random(seed)
        return Schedule(
            seed,
            chunk=draw.choice((2, 5, 16, 16, 33, 64, 512)),
            max_sequences=draw.choice((1, 2, 3, 5, 8)),
            room=draw.choice((None, 1.0, 1.0, 1.5, 2.0)),
            sharing=draw.random() < 0.7,
            speculates=draw.random() < 0.5,
            threads=draw.randint(1, threads),
            nuisance=draw.choice((0, 0, 1, 2)),
            turns=draw.choice((0, 1, 3, 8)),
        )


def requests(lm: LanguageModel, seed: int, count: int, prompt: int, new: int, forks: bool = True) -> list[Asked]:
    """`count` sampled requests of up to `prompt` random tokens that begin alike, for up to `new` more tokens each."""
    draw, ids_of, tokens = random.Random(seed), random.Random(seed), lm.tokenizer.vocab_size
    shared = [ids_of.randrange(tokens) for _ in range(prompt)]
    asked = []
    for number in range(count):
        length = draw.randint(1, prompt)
        kept = draw.randint(0, length)
        ids = shared[:kept] + [ids_of.randrange(tokens) for _ in range(length - kept)]
        n = draw.choice((1, 1, 2, 3)) if forks else 1
        params = SamplingParams(max_tokens=draw.randint(1, new), seed=number, n=n, ignore_eos=True)
        asked.append((ids, params))
    return asked


def play(lm: LanguageModel, asked: Sequence[Asked], schedule: Schedule, debug: bool = False) -> tuple[list[Job], Statistics]:
    """The jobs of `asked`, in that order, all ended, and what the engine counted."""
    with threads(schedule.threads):
        engine = Engine(lm.model, lm.tokenizer, _config(lm.model, asked, schedule, debug))
        jobs = _live(engine, asked, schedule)
        return jobs, engine.stats()


def _live(engine: Engine, asked: Sequence[Asked], schedule: Schedule) -> list[Job]:
    draw, jobs = random.Random(schedule.seed), dict[int, Job]()
    arriving = [*range(len(asked)), *([-1] * schedule.nuisance)]
    draw.shuffle(arriving)
    unwanted: list[Job] = []
    for number in arriving:
        prompt, params = asked[number if number >= 0 else draw.randrange(len(asked))]
        job = engine.submit(prompt, params, priority=draw.choice((0, 0, 1)))
        if number < 0:
            unwanted.append(job)
        else:
            jobs[number] = job
        for _ in range(draw.randint(0, schedule.turns)):
            engine.step()
        if unwanted and draw.random() < 0.5:
            engine.cancel(unwanted.pop())
    for job in unwanted:
        engine.cancel(job)
    engine.run()
    return [jobs[number] for number in range(len(asked))]


def _config(model: ModelModule, asked: Sequence[Asked], schedule: Schedule, debug: bool) -> EngineConfig:
    together = min(schedule.max_sequences, schedule.chunk)
    config = EngineConfig(chunk=schedule.chunk, max_sequences=together, prefix_sharing=schedule.sharing, debug=debug)
    if schedule.speculates:
        config = config.model_copy(update={"speculation": PromptLookup()})
    if schedule.room is None or not (isinstance(model, StackModule) and model.side_by_side):
        return config
    longest = max(len(prompt) + params.max_tokens for prompt, params in asked)
    whole = sum(
        pool.bytes_per_page * Group(pool.group, 0).most_pages(longest, schedule.chunk) * (1 if pool.group is None else 2)
        for pool in model.new_pages(1)
        if pool is not None
    )  # an engine gives layers with a window twice what they need at least
    folds = schedule.sharing and None in model.new_pages(1)
    beside = SNAPSHOT_SHARE / (SNAPSHOT_SHARE - 1) if folds else 1.0
    memory = math.ceil(whole * schedule.room * beside * (1 + 1e-6))
    return config.model_copy(update={"context": longest, "memory": memory} if whole else {})


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with so many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
