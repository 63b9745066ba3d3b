"""From hidden states to answers: who is asked for which rows, sampling, and who is told.

A sequence whose last token was computed gets its next one from that token's hidden state, and more where proposals stood behind
it (`Sampler`). Several answers to one prompt (n, best_of, beams) are one sequence until the prompt is read. Then they fork, and
all first tokens come from the same row.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headspring.inference.engine.beams import Answer, Candidate, Search, extend, replay
from headspring.inference.engine.job import Job, Update
from headspring.inference.engine.sampler import Sampler
from headspring.inference.engine.sequence import Sequence, Work
from headspring.inference.engine.submission import request_of
from headspring.inference.generation import Request, most_probable
from headspring.inference.sampling import log_probs_of_logits, tops_of

if TYPE_CHECKING:
    from headspring.inference.engine.engine import Engine

Asking = tuple[Sequence, Tensor, list[int]]  # its rows of hidden states, and the proposals behind the first


class Answering:
    """The part of an `engine` that turns rows into tokens, and tokens into answers."""

    def __init__(self, engine: "Engine"):
        self.engine = engine
        self.sampler = Sampler(engine.model.config.vocab, engine.tokenizer.vocab_size, engine.model.device)
        self.tokens = 0  # sampled so far

    # ---- sequences

    def first(self, job: Job) -> Sequence:
        """The sequence that reads a job's prompt."""
        sequence = self._sequence(job, 0)
        if job.params.beam_width is not None:
            job.search = Search(job.params, sequence.request.new_tokens)
        sequence.probe = job.probe
        return sequence

    def _request(self, job: Job, answer: int = 0) -> Request:
        return request_of(job, self.engine.context, self.engine.tokenizer, answer)

    def _sequence(self, job: Job, answer: int) -> Sequence:
        request = self._request(job, answer)
        job.requests.append(request)
        job.sequences.append(Sequence(job, request, answer))
        return job.sequences[-1]

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let the child go on from where the parent is."""
        scheduler = self.engine.scheduler
        child.probe = None if parent.probe is None else parent.probe.fork()
        if parent.running and len(scheduler.running) < scheduler.max_sequences:
            self.engine.cache.fork(parent, child)
            self.engine.runner.fork(parent, child)
        scheduler.add(child)

    # ---- before the step: which hidden states are wanted

    def ask(self, work: list[Work]) -> None:
        """Note how many rows of each work are wanted: those that tokens follow from, and those of the prompt where its
        log-probabilities are asked for."""
        for item in work:
            sequence = item.sequence
            if item.count == sequence.uncomputed:
                item.rows = 1
            if sequence.job.wants_prompt and sequence.computed < len(sequence.job.prompt):
                known = max(0, len(sequence.job.prompt_logprobs) - sequence.computed)
                item.rows = max(item.rows, item.count - known)

    # ---- after it

    def answer(self, done: list[tuple[Work, Tensor]]) -> None:
        """Give every sequence whose last token was computed what follows from it."""
        asking: list[Asking] = []
        for item, hidden in done:
            sequence = item.sequence
            if sequence.job.finished:
                continue
            proposals, sequence.proposals = sequence.proposals, []
            if sequence.job.wants_prompt:
                hidden = self._read_prompt(sequence, hidden, len(proposals))
            if sequence.computed < len(sequence.tokens):
                continue
            if sequence.job.params.beam_width is not None:
                sequence.row = hidden[-1]
            else:
                asking += [(one, hidden, proposals) for one in self._with_siblings(sequence)]
        if asking:
            self._sample(asking)
        for job in {item.sequence.job.number: item.sequence.job for item, _ in done}.values():
            if not job.finished and job.params.beam_width is not None and all(one.row is not None for one in job.sequences):
                self._search(job)
        for item, _ in done:
            if item.sequence.running:
                self._settle(item.sequence)

    def _read_prompt(self, sequence: Sequence, hidden: Tensor, proposed: int) -> Tensor:
        """Note what rows (R, D), the last of those computed, say of the prompt's own tokens; returns those that tokens follow
        from."""
        job, first = sequence.job, sequence.computed - len(hidden)
        told = hidden[: max(0, len(job.prompt) - 1 - first)]
        if len(told):
            ids = job.prompt[first + 1 : first + 1 + len(told)]
            logits = self.engine.model.logits(told)
            log_probs = log_probs_of_logits(logits, torch.tensor(ids, device=logits.device)).tolist()
            count = job.params.prompt_logprobs or None
            job.prompt_logprobs += log_probs
            job.prompt_tops += tops_of(logits, ids, log_probs, count)
        return hidden[max(0, len(hidden) - 1 - proposed) :]

    def _with_siblings(self, sequence: Sequence) -> list[Sequence]:
        """A sequence, and the other answers to its prompt if it is the first to have read that."""
        job = sequence.job
        if len(job.requests) == job.params.answers:
            return [sequence]
        siblings = [self._sequence(job, answer) for answer in range(len(job.requests), job.params.answers)]
        for sibling in siblings:
            self.fork(sequence, sibling)
        return [sequence, *siblings]

    def _sample(self, asking: list[Asking]) -> None:
        """One call of the sampler for all rows; where it raises, one for each, and who raises alone has failed alone."""
        requests, proposals = [sequence.request for sequence, _, _ in asking], [proposed for _, _, proposed in asking]
        try:
            logits = self.engine.model.logits(torch.cat([rows for _, rows, _ in asking]))
            failures = self.sampler.sample(requests, logits, proposals)
        except Exception as error:
            if len(asking) > 1:
                for sequence, rows, proposed in asking:
                    if len(sequence.request.prompt) + len(sequence.request.token_ids) > len(sequence.tokens):
                        self._take(sequence, rows, len(proposed), None)  # it had its tokens before another one raised
                    elif not sequence.job.finished:
                        self._sample([(sequence, rows, proposed)])
                return
            failures = [error]
        for (sequence, rows, proposed), failure in zip(asking, failures, strict=True):
            self._take(sequence, rows, len(proposed), failure)

    def _take(self, sequence: Sequence, rows: Tensor, proposed: int, failure: Exception | None) -> None:
        """A sequence got tokens by these rows, or a failure."""
        if sequence.job.finished:
            return  # by what it was told of another answer
        known = len(sequence.tokens) - len(sequence.request.prompt)
        new = sequence.request.token_ids[known:]
        if failure is not None:
            self.engine.end(sequence.job, "failed", failure)
            return
        sequence.tokens += new
        self.tokens += len(new)
        if self.engine.speculator is not None:
            self.engine.speculator.check(sequence.request, proposed, rows[: len(new)])
        self._tell(sequence, known)

    # ---- beams

    def _search(self, job: Job) -> None:
        """One step of a beam search, for which the hidden states of all beams are there."""
        beams, search = list(job.sequences), job.search
        assert search is not None
        logits = self.engine.model.logits(torch.stack([beam.row for beam in beams if beam.row is not None]))
        try:
            going, ended = search.split(beams, search.candidates(beams, logits, self.sampler.named))
            answers = [self._ended(job, beams[one.beam], logits[one.beam], one, search) for one in ended]
        except Exception as error:
            self.engine.end(job, "failed", error)
            return
        search.take(answers, going, len(beams[0].request.token_ids) + 1)
        self.tokens += len(beams)
        self._go_on(job, beams, logits, going if search.totals else [])
        if not job.sequences:
            self._finish_search(job, search)

    def _ended(self, job: Job, beam: Sequence, logits: Tensor, one: Candidate, search: Search) -> Answer:
        request = extend(replay(beam.request, self._request(job)), logits, one.token)
        seen = None if beam.probe is None else beam.probe.seen(len(beam.tokens))
        return Answer(search.score(one.total, len(request.token_ids)), request, seen)

    def _go_on(self, job: Job, beams: list[Sequence], logits: Tensor, going: list[Candidate]) -> None:
        """Each candidate becomes a sequence: the first to follow a beam is that beam, the others are forked from it."""
        used = {one.beam for one in going}
        for number, beam in enumerate(beams):
            if number not in used:
                self.engine.scheduler.remove(beam)
                job.sequences.remove(beam)
        names = (name for name in range(2 * len(beams) + len(going)) if name not in {one.answer for one in job.sequences})
        order = []
        for place, one in enumerate(going):
            parent = beams[one.beam]
            first = all(other.beam != one.beam for other in going[place + 1 :])  # the last to be made takes the parent itself
            order.append(parent if first else Sequence(job, replay(parent.request, self._request(job)), next(names)))
            if not first:
                self.fork(parent, order[-1])
        for one, sequence in zip(going, order, strict=True):
            extend(sequence.request, logits[one.beam], one.token)
            sequence.tokens.append(one.token)
            sequence.row = None
        job.sequences[:] = order

    def _finish_search(self, job: Job, search: Search) -> None:
        best = search.answers[: job.params.n]
        job.requests = [one.request for one in best]
        job.seen = {number: one.seen for number, one in enumerate(best) if one.seen is not None}
        self._finish(job)

    def _settle(self, sequence: Sequence) -> None:
        """Bring the books up to date: what was computed for rejected proposals is forgotten."""
        engine, kept = self.engine, min(sequence.computed, len(sequence.tokens) - (sequence.row is None))
        if kept < sequence.computed:
            engine.go_back(sequence, kept)
        engine.cache.settle(sequence)

    # ---- telling

    def _tell(self, sequence: Sequence, known: int) -> None:
        """What a sequence got after its first `known` tokens: to whoever listens, and to the job where it is finished."""
        job, request = sequence.job, sequence.request
        if request.finish_reason is not None:
            if sequence.probe is not None:
                job.seen[sequence.answer] = sequence.probe.seen(len(sequence.tokens) - 1)
            self._settle(sequence)  # what it has read others may share, though it was read in this very step
            self.engine.scheduler.remove(sequence)
            job.sequences.remove(sequence)
        if job.notify is not None and not job.chooses:
            self._notify(job, update_of(sequence, known))
        finished = len(job.requests) == job.params.answers and not job.sequences  # the others may end in this very step
        if finished and not job.finished:
            self._finish(job)

    def _finish(self, job: Job) -> None:
        answers = [replace(request.generation(), seen=job.seen.get(number)) for number, request in enumerate(job.requests)]
        job.generations = most_probable(answers, job.params.n) if job.search is None and job.chooses else answers
        if job.chooses:
            for number, answer in enumerate(job.generations):
                told = (answer.text, answer.token_ids, answer.logprobs, answer.top_logprobs, answer.finish_reason)
                self._notify(job, Update(number, *told))
        if not job.finished:
            self.engine.end(job, "finished")

    def _notify(self, job: Job, update: Update) -> None:
        """Tell the listener; one that raises ends its own job."""
        if job.notify is None or job.finished:
            return
        try:
            job.notify(update)
        except Exception as error:
            if not job.finished:
                self.engine.end(job, "failed", error)


def update_of(sequence: Sequence, known: int) -> Update:
    """What a sequence has beyond its first `known` answered tokens."""
    request = sequence.request
    tops = None if request.params.logprobs is None else list(request.top_logprobs[known:])
    piece = request.take_piece()
    return Update(sequence.answer, piece, request.token_ids[known:], request.logprobs[known:], tops, request.finish_reason)
