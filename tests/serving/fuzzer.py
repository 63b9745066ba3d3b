"""A world of clients that do everything at the wrong moment, and a model of what must hold all the same.

    world.step():  somebody submits · reads · leaves · the clock jumps · a fault is armed · the engine turns once
    every so often: everything ends, and nothing may be left

The engine, its scheduler, cache and sampler and the loop and sessions of the server are the real ones; only the model is a
stand-in. It answers by a checksum of the tokens that its *pages* hold, so that a page given to the wrong sequence, shared with
a wrong prefix or not recomputed gives a wrong token, and it is a thousand times faster than a model.

What must hold, whatever happens:
- each session ends exactly once, and nothing comes after its end; who leaves is not served for another turn;
- a finished answer is, token by token, the one that the request gets alone in an empty world; a cut one is its beginning;
- only what was broken fails: a poisoned request always, a neighbour only in a step whose bookkeeping raised;
- when all is over, no page is held, no job known, no sequence scheduled, and the counters add up.

Worlds of odd seeds have a model with a folded state.
"""

import random
import zlib
from collections import Counter

import torch

from headspring.inference.engine import Engine, EngineConfig
from headspring.inference.engine.beside import Beside
from headspring.inference.engine.cache import PAGE, Group, Pool
from headspring.inference.engine.sampler import Sampler
from headspring.inference.generation import Request, most_probable
from headspring.inference.sampling import SamplingParams
from headspring.inference.speculation.speculator import Speculator
from headspring.inference.speculation.values import PromptLookup
from headspring.models.state import RecurrentState
from headspring.serving.loop import EngineLoop
from headspring.serving.metrics import Metrics
from headspring.serving.session import Session
from tests.inference.tiny import tiny_decoder

ROWS, CONTEXT, PAGES, LAG, QUEUE = 97, 128, 24, 24, 12
NAN = -1.0
NAME = "fuzzed"


class Fault(Exception):
    """What the world breaks on purpose."""


class StandIn:
    """A model whose logits follow from a checksum of its whole context."""

    device = torch.device("cpu")
    compute_dtype = torch.float32
    packed_head = None

    def __init__(self, vocab: int):
        self.config = tiny_decoder(vocab, context=CONTEXT)
        generator = torch.Generator().manual_seed(1)
        self.table = torch.randn(ROWS, vocab, generator=generator) * 3

    def modules(self):
        return ()

    def hidden(self, context: list[int]) -> float:
        return zlib.crc32(repr(context).encode()) % ROWS

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = self.table[hidden[:, 0].long().clamp(min=0)].clone()
        rows[hidden[:, 0] == NAN] = torch.nan
        return rows


class Runner:
    """Pages are lists of tokens. `armed` makes one call raise; poisoned sequences raise, or give numbers that are none."""

    shares = True
    snapshot_bytes: int | None = None

    def __init__(self, model: StandIn, num_pages: int):
        self.model, self.groups = model, [Group(None, num_pages)]
        self.pages = [[0] * PAGE for _ in range(num_pages)]
        self.armed = False
        self.poisoned: dict[int, str] = {}  # number of a job → "raises" or "nan"

    def copy(self, copies):
        for one in copies:
            self.pages[one.target][:] = self.pages[one.source]

    def run(self, work):
        rows = []
        for item in work:
            start, context = item.sequence.computed, self.read(item)
            kind = self.poisoned.get(item.sequence.job.number)
            if kind == "raises":
                raise Fault("a poisoned request")
            ends = range(start + item.count - item.rows, start + item.count)
            rows += [[NAN] if kind == "nan" else [self.model.hidden(context[: end + 1])] for end in ends]
            if self.armed:  # in the middle of the batch: some have been written and some not
                self.armed = False
                raise Fault("a forward pass that fails once")
        return torch.tensor(rows, dtype=torch.float32).reshape(-1, 1)

    def read(self, item) -> list[int]:
        """All tokens of a sequence, as its pages hold them."""
        table = item.sequence.tables[0]
        for place, token in enumerate(item.tokens, item.sequence.computed):
            self.pages[table[place // PAGE]][place % PAGE] = token
        return [token for page in table for token in self.pages[page]]

    def fork(self, parent, child):
        pass

    def boundary(self, sequence, length):
        return length


class Folded(Runner):
    """The same with a folded state, which alone knows what was read: a prefix is begun from a snapshot of it."""

    snapshot_bytes = 2000  # of 8 for each token

    def read(self, item) -> list[int]:
        sequence = item.sequence
        if sequence.state is None:
            snapshot, sequence.snapshot = sequence.snapshot, None
            empty = RecurrentState(seen=torch.zeros(1, 0, dtype=torch.int64))
            sequence.state = Beside({0: empty}) if snapshot is None else Beside.resumed(snapshot, CONTEXT)
        state = sequence.state.layers[0]
        assert state.length == sequence.computed, "a state of another place"
        state.replace(item.count, seen=torch.cat([state["seen"], torch.tensor([item.tokens])], dim=1))
        return state["seen"][0].tolist()

    def fork(self, parent, child):
        child.state = parent.state.fork()

    def boundary(self, sequence, length):
        length = sequence.state.rewind(length)
        if length == 0:
            sequence.state = None
        return length

    def snapshot(self, sequence):
        return sequence.state.snapshot(sequence.computed)


class Guesses:
    """Proposes what the stand-in finds most likely: right for greedy requests, mostly wrong for others; sometimes it breaks."""

    way = True  # it is asked always, whether that pays or not
    switched_off = 0

    def __init__(self, model: StandIn, draw: random.Random):
        self.model, self.draw = model, draw

    def of(self, answers: int) -> "Guesses":
        return self

    def note(self, *_) -> None:
        pass

    def propose(self, requests, limits):
        if self.draw.random() < 0.01:
            raise Fault("a proposer that breaks")
        return [self._guess(request, self.draw.randrange(limit + 1)) for request, limit in zip(requests, limits, strict=True)]

    def _guess(self, request, count: int) -> list[int]:
        context, guessed = request.prompt + request.token_ids, []
        for _ in range(count):
            guessed.append(int(self.model.table[self.model.hidden(context + guessed)].argmax()))
        return guessed

    def observe(self, request, hidden) -> None:
        pass


class Clock:
    """Seconds that move when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Kind:
    """A request that clients send again and again, and the answers that it has alone."""

    def __init__(self, world: "World", draw: random.Random):
        shared = [draw.randrange(3, 60) for _ in range(70)]
        length = draw.choice((1, 5, 31, 32, 33, 64, 70))
        self.prompt = shared[:length] if draw.random() < 0.5 else [*world.common[:length], draw.randrange(60)]
        answers = draw.choice((1, 1, 1, 2, 3))
        options = {"temperature": draw.choice((0.0, 1.0)), "seed": draw.randrange(99), "n": answers}
        if options["temperature"] and draw.random() < 0.2:
            options["best_of"] = answers + 1
        if draw.random() < 0.3:
            options["stop_token_ids"] = tuple(draw.randrange(300) for _ in range(8))
        if draw.random() < 0.2:
            options["repetition_penalty"] = 1.3
        self.params = SamplingParams.of(max_tokens=draw.randrange(1, 40), **options)
        self.alone = [self._alone(world, answer) for answer in range(self.params.answers)]
        best = self.params.answers > self.params.n
        self.answers = most_probable(self.alone, self.params.n) if best else self.alone

    def _alone(self, world: "World", answer: int):
        request = Request(world.tokenizer, self.prompt, self.params, context=CONTEXT, end_ids=world.ends, answer=answer)
        sampler = Sampler(world.model.config.vocab, world.tokenizer.vocab_size, world.model.device)
        while request.finish_reason is None:
            hidden = torch.tensor([[world.model.hidden(self.prompt + request.token_ids)]])
            assert sampler.sample([request], world.model.logits(hidden)) == [None]
        return request.generation()


class Watched(Session):
    """A session whose job, once it is one, may be poisoned."""

    def accept(self, job):
        super().accept(job)
        if self.poison is not None:
            self.runner.poisoned[job.number] = self.poison


class Client:
    """One session and what its reader knows."""

    def __init__(self, kind: Kind, session: Session, pace: float, leaves_at: int | None, poison: str | None):
        self.kind, self.session, self.pace, self.leaves_at, self.poison = kind, session, pace, leaves_at, poison
        self.read: dict[int, list[int]] = {}
        self.reasons: dict[int, str] = {}
        self.may_fail = poison is not None

    def look(self) -> None:
        """Read what there is, and compare it with the beginning of the right answer."""
        for update in self.session.take():
            if update.finish_reason not in (None, "stop", "length"):
                continue  # the news of another end, which `check_end` looks at
            tokens = self.read.setdefault(update.answer, [])
            assert update.answer not in self.reasons, "something came after an answer's end"
            tokens += update.token_ids
            if update.finish_reason is not None:
                self.reasons[update.answer] = update.finish_reason
            right = self.kind.answers[update.answer].token_ids
            assert tokens == right[: len(tokens)], f"answer {update.answer} is not the one that it is alone"
        if self.leaves_at is not None and sum(map(len, self.read.values())) >= self.leaves_at:
            self.session.cancel("left")

    def check_end(self) -> None:
        """After its end."""
        session, end = self.session, self.session.end_as
        assert end is not None, "a session never ended"
        if end in ("finished", "stopped"):
            assert self.poison is None, "a poisoned request finished"
            got = [(one.token_ids, one.finish_reason, one.text) for one in session.job.generations]
            assert got == [(one.token_ids, one.finish_reason, one.text) for one in self.kind.answers]
            if session.reason is None:
                self.look()
                assert [self.read[i] for i in range(len(got))] == [one[0] for one in got], "a reader missed something"
        elif end == "failed":
            if not self.may_fail:
                raise AssertionError("a healthy request failed") from session.error
        elif end == "cancelled":
            assert session.reason is not None, "cancelled, and nobody asked for it"
        elif end == "rejected":
            assert session.job is None and session.error is not None


class World:
    """Everything, from one seed. `step` does one thing; `settle` lets all of it end and looks for what is left."""

    def __init__(self, tokenizer, seed: int, debug: bool = True, faults: bool = True):
        self.draw, self.clock, self.tokenizer, self.faults = random.Random(seed), Clock(), tokenizer, faults
        self.model = StandIn(tokenizer.vocab_size)
        self.ends = [end for end in (tokenizer.eos_id, tokenizer.end_id) if end is not None]
        self.common = [self.draw.randrange(3, 60) for _ in range(70)]
        self.runner = (Runner, Folded)[seed % 2](self.model, PAGES)
        config = EngineConfig(max_sequences=6, chunk=self.draw.choice((6, 16, 48)), max_queue=QUEUE, debug=debug)
        self.engine = Engine(self.model, tokenizer, config, runner=self.runner, clock=self.clock)
        if self.draw.random() < 0.5:
            guesses = Guesses(self.model, self.draw)
            self.engine.speculator = Speculator(PromptLookup(), self.model, tokenizer, self.clock, guesses)
            self.engine.speculator.proposer = guesses
        self.loop = EngineLoop({NAME: self.engine}, Metrics())
        self.kinds = [Kind(self, self.draw) for _ in range(24)]
        self.clients: list[Client] = []
        self.ends_seen: Counter[str] = Counter()
        self.steps = self.armed_allocation = 0
        self._arm_pools()

    def _arm_pools(self) -> None:
        """Let the k-th page that is taken from now on raise, where that is armed."""

        def take(pool: Pool, group: int, plain=Pool.take):
            if self.armed_allocation:
                self.armed_allocation -= 1
                if self.armed_allocation == 0:
                    raise Fault("no page")
            return plain(pool, group)

        for pool in self.engine.cache.pools:
            pool.take = take.__get__(pool)

    def step(self) -> None:
        """One thing happens."""
        self.steps += 1
        dice = self.draw.random()
        if dice < 0.12:
            self._submit()
        elif dice < 0.35:
            self._read()
        elif dice < 0.37 and self.clients:
            self.draw.choice(self.clients).session.cancel("changed its mind")
        elif dice < 0.375:
            self.clock.now += self.draw.choice((0.01, 1.0, 30.0, 500.0))
        elif dice < 0.385 and self.faults:
            self._break()
        else:
            self._turn()
        if self.steps % 1500 == 0:
            self.settle()

    def _submit(self) -> None:
        kind = self.draw.choice(self.kinds)
        poison = self.draw.choice(("raises", "nan")) if self.faults and self.draw.random() < 0.02 else None
        session = Watched(lambda: None, self.clock, LAG, streamed=True)
        session.runner, session.poison = self.runner, poison
        pace = self.draw.choice((1.0, 1.0, 0.3, 0.05, 0.0))
        client = Client(kind, session, pace, self.draw.choice((None, None, None, 0, 1, 7)), poison)
        self.clients.append(client)
        timeout = self.draw.choice((None, 0.0, 1.0, 60.0))
        options = {"timeout": timeout, "priority": self.draw.choice((0, 0, 1)), "key": self.draw.choice(("", "a", "b"))}
        prompt = kind.prompt if self.draw.random() < 0.98 else [7] * CONTEXT  # which can never be answered
        self.loop.submit(NAME, session, prompt, kind.params, **options)

    def _read(self) -> None:
        for client in self.clients:
            if self.draw.random() < client.pace:
                client.look()

    def _break(self) -> None:
        if self.draw.random() < 0.5:
            self.runner.armed = True
        else:
            self.armed_allocation = self.draw.randrange(1, 6)

    def _turn(self) -> None:
        self.clock.now += 0.001
        armed = self.armed_allocation
        leaving = [client.session for client in self.clients if client.session.reason is not None]
        self.loop.tick()
        assert all(session.end_as is not None for session in leaving), "somebody left, and is still served"
        if armed and not self.armed_allocation:  # the bookkeeping of this step raised: all that it held may fail
            for client in self.clients:
                client.may_fail |= client.session.ended == self.clock.now

    def settle(self) -> None:
        """Let everything end, and look for what is left."""
        self.runner.armed, self.armed_allocation = False, 0
        turns = 0
        while not self.loop.idle:
            self._turn()
            self._read()
            turns += 1
            assert turns < 5000, "something hangs"
        assert not self.loop.tick() and not self.loop.broken
        engine = self.engine
        assert not engine.jobs and not list(engine.scheduler), "a job is left"
        assert engine.cache.used == 0, f"{engine.cache.used} pages leak"
        engine.cache.check([])
        for client in self.clients:
            client.check_end()
            self.ends_seen[client.session.end_as] += 1
        counted = {end: self.loop.metrics.outcomes.labels(NAME, end)._value.get() for end in self.ends_seen}
        assert counted == self.ends_seen, "the counters do not add up"
        self.clients.clear()
        self.runner.poisoned.clear()
