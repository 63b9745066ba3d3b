"""The engine as one would write it on a blackboard: one prompt at a time, no cache, no batch, the whole text again for each
token, lists in the place of tensors. The oracle of everything that the engine does to be fast.
"""

import math
from dataclasses import dataclass, field

import torch

from headspring.inference.generation import uniform_numbers
from headspring.inference.sampling_params import SamplingParams


@dataclass
class Answer:
    """As a `Generation`: ids, their log-probabilities under the model itself, and why it ended."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None


class ReferenceEngine:
    """Answers prompts of token ids with a `LanguageModel`."""

    def __init__(self, lm):
        self.lm = lm
        self.named = lm.tokenizer.vocab_size

    def answers(self, prompt: list[int], params: SamplingParams, source: list[int] | None = None) -> list[Answer]:
        """The answers that a job with these params gives, in order."""
        if params.beam_width is not None:
            return self._beams(prompt, params, source)[: params.n]
        made = [self._answer(prompt, params, number, source) for number in range(params.best_of or params.n)]
        if params.best_of is None:
            return made
        return sorted(made, key=lambda one: -sum(one.logprobs) / len(one.logprobs))[: params.n]

    @torch.no_grad()
    def log_probs(self, ids: list[int], source: list[int] | None = None) -> list[float]:
        """Of every token, after these."""
        given = {} if source is None else {"source": torch.tensor([source])}
        hidden = self.lm.model(torch.tensor([ids]), **given)
        return self.lm.model.logits(hidden)[0, -1].double().log_softmax(-1).tolist()

    def _room(self, prompt: list[int], params: SamplingParams) -> int:
        return min(params.max_tokens, self.lm.context - len(prompt))

    def _stops(self, params: SamplingParams) -> set[int]:
        ends = set() if params.ignore_eos else {self.lm.tokenizer.eos_id, self.lm.tokenizer.end_id}
        return {token for token in ends | set(params.stop_token_ids) if token is not None}

    def _answer(self, prompt: list[int], params: SamplingParams, number: int, source: list[int] | None) -> Answer:
        answer, room = Answer(), self._room(prompt, params)
        uniforms = uniform_numbers(params, source or prompt, number, room).tolist()
        while answer.finish_reason is None:
            written = answer.token_ids
            log_probs = self.log_probs(prompt + written, source)
            token = choose(self._adjusted(log_probs, prompt, written, params), params, uniforms[len(written)])
            may_stop = len(written) >= params.min_tokens
            written.append(token)
            answer.logprobs.append(log_probs[token])
            self._end(answer, params, room, may_stop)
        return answer

    def _end(self, answer: Answer, params: SamplingParams, room: int, may_stop: bool) -> None:
        """Note the text, and why the answer ends, if it does."""
        ids, decode = answer.token_ids, self.lm.tokenizer.decode
        answer.text = decode(ids)
        if may_stop and ids[-1] in self._stops(params):
            answer.finish_reason, answer.text = "stop", decode(ids[:-1])
        elif len(ids) == room:
            answer.finish_reason = "length"
        # Before `min_tokens` a stop string does not count: only what reaches into a later token is found.
        early = len(decode(ids[: params.min_tokens])) if params.min_tokens else 0
        places = [place for stop in params.stop if (place := answer.text.find(stop, early)) >= 0]
        if places and may_stop:
            answer.finish_reason, answer.text = "stop", answer.text[: min(places)]

    def _adjusted(self, log_probs: list[float], prompt: list[int], written: list[int], params: SamplingParams) -> list[float]:
        """Penalties, bias, and what must not come."""
        scores = log_probs[: self.named]
        if params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty or params.logit_bias:
            raise NotImplementedError("penalties act on logits: tests/inference/test_sampling.py checks them")
        if len(written) < params.min_tokens:
            scores = [-math.inf if token in self._stops(params) else score for token, score in enumerate(scores)]
        return scores

    # ---- beam search

    def _beams(self, prompt: list[int], params: SamplingParams, source: list[int] | None) -> list[Answer]:
        width, room, stops = params.beam_width, self._room(prompt, params), self._stops(params)
        beams, finished = [(0.0, Answer())], []
        while beams:
            found = [
                (total + score, beam, token, log_probs[token])
                for total, beam in beams
                for log_probs in [self.log_probs(prompt + beam.token_ids, source)]
                for token, score in enumerate(self._adjusted(log_probs, prompt, beam.token_ids, params))
                if score > -math.inf
            ]
            found = sorted(found, key=lambda one: -one[0])[: max(2, 1 + len(stops)) * width]
            beams = []
            for rank, (total, beam, token, log_prob) in enumerate(found):
                longer = Answer([*beam.token_ids, token], [*beam.logprobs, log_prob])
                self._end(longer, params, room, True)
                if longer.finish_reason is None:
                    beams.append((total, longer))
                elif rank < width:
                    finished.append((total / len(longer.token_ids) ** params.length_penalty, longer))
            beams, finished = beams[:width], sorted(finished, key=lambda one: -one[0])[:width]
            if beams and len(finished) == width and self._hopeless(beams, finished[-1][0], params, room):
                break
        return [answer for _, answer in finished]

    def _hopeless(self, beams: list, worst: float, params: SamplingParams, room: int) -> bool:
        """Whether no beam may still become an answer."""
        if params.early_stopping is True:
            return True
        far = params.early_stopping == "never" and params.length_penalty > 0
        length = room if far else len(beams[0][1].token_ids)
        return beams[0][0] / length**params.length_penalty <= worst


def choose(scores: list[float], params: SamplingParams, uniform: float) -> int:
    """The token at a uniform number: the first whose cumulative probability, in order of ids, is beyond it."""
    if params.temperature == 0:
        return max(range(len(scores)), key=lambda token: scores[token])
    best = max(scores)
    weights = [math.exp((score - best) / params.temperature) for score in scores]
    for keep in (_top_k, _top_p, _min_p):
        kept = keep(weights, params)
        weights = [weight if weight >= kept else 0.0 for weight in weights]
    target, reached = uniform * sum(weights), 0.0
    for token, weight in enumerate(weights):
        reached += weight
        if weight and reached > target:
            return token
    return max(token for token, weight in enumerate(weights) if weight)


def _top_k(weights: list[float], params: SamplingParams) -> float:
    """The smallest weight that stays."""
    return sorted(weights, reverse=True)[min(params.top_k or len(weights), len(weights)) - 1]


def _top_p(weights: list[float], params: SamplingParams) -> float:
    if params.top_p == 1:
        return 0.0
    before, total = 0.0, sum(weights)
    for weight in sorted(weights, reverse=True):
        before += weight
        if before >= params.top_p * total:
            return weight
    return 0.0


def _min_p(weights: list[float], params: SamplingParams) -> float:
    return params.min_p * max(weights)
