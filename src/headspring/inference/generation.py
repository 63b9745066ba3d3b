"""A request and its answer: what one prompt asks for, what it has got so far, and when it is done."""

import hashlib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from headspring.artifacts import UserError
from headspring.inference.history import History
from headspring.inference.sampling_params import SamplingParams
from headspring.inference.structured import Matcher, compile_structured
from headspring.inference.text_stream import TextStream
from headspring.tokenization.tokenizer import Tokenizer

if TYPE_CHECKING:
    from headspring.inference.inspection import Seen

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Generation:
    """One answer.

    `token_ids` are the sampled ids, with the stop token that ended them, if one did; `text` is without it and ends
    before a stop string. `logprobs[i]` is the natural log-probability of `token_ids[i]` under the model itself, before
    temperature, penalty and filters; `top_logprobs[i]` maps the most likely ids to theirs, where asked for (one tensor a
    token behind it where all are).
    `finish_reason`: "stop" for a stop token or string, "length" for `max_tokens` or the end of the context.
    `prompt_token_ids` are those of the source where an encoder–decoder answers. `seen` is what an inspection asked to see."""

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    prompt_token_ids: list[int] = field(repr=False)
    top_logprobs: list[Mapping[int, float]] | None = field(default=None, repr=False)
    seen: "Seen | None" = field(default=None, repr=False)


def most_probable(answers: Sequence[Generation], count: int) -> list[Generation]:
    """The `count` answers whose tokens have the highest mean log-probability, the best first; what `best_of` gives back."""
    return sorted(answers, key=lambda answer: -sum(answer.logprobs) / len(answer.logprobs))[:count]


class Request:
    """A prompt on its way to an answer.

    `new_tokens` is how many it may get: `max_tokens`, or less where the context of the model ends first.
    `piece` is the text that became certain since it was last taken; it is kept only for an `incremental` request."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: list[int],
        params: SamplingParams,
        *,
        context: int,
        end_ids: Iterable[int] = (),
        answer: int = 0,
        incremental: bool = False,
        source: Iterable[int] = (),
    ):
        """Answer number `answer` to `prompt`, which must be shorter than `context`. `source` is what an encoder reads.

        Raises `UserError` for a structure that cannot be compiled, and for ids that the tokenizer does not have."""
        self.prompt, self.params, self.incremental = prompt, params, incremental
        self.source = list(source)
        self.new_tokens = min(params.max_tokens, context - len(prompt))
        assert self.new_tokens > 0
        if wrong := [token for token in params.logit_bias if not 0 <= token < tokenizer.vocab_size]:
            raise UserError(f"logit_bias: token id {wrong[0]} is outside the vocabulary of {tokenizer.vocab_size} tokens")
        self.stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(end_ids))
        self.uniforms = uniform_numbers(params, self.asked, answer, self.new_tokens)
        self.history = History(prompt) if params.penalizes else None
        self.matcher = _matcher(params, tokenizer)
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[Mapping[int, float]] = []
        self.finish_reason: FinishReason | None = None
        self.piece = ""
        self._stream = TextStream(tokenizer, params.stop)
        self._decoded = 0  # tokens already given to the stream

    @property
    def asked(self) -> list[int]:
        """What is answered: the source, where there is one."""
        return self.source or self.prompt

    @property
    def remaining(self) -> int:
        """Tokens it may still get."""
        return self.new_tokens - len(self.token_ids)

    @property
    def may_stop(self) -> bool:
        """Whether the next token may be the last one by its own choice."""
        return len(self.token_ids) >= self.params.min_tokens

    def accept(self, token: int, log_prob: float, top: Mapping[int, float] | None = None) -> None:
        """Take a sampled token. Raises `HeadspringError` where the text's structure does not allow it."""
        may_stop = self.may_stop
        if self.matcher is not None:
            self.matcher.accept(token)
        self.token_ids.append(token)
        self.logprobs.append(log_prob)
        if top is not None:
            self.top_logprobs.append(top)
        if self.history is not None:
            self.history.push(token)
        if may_stop and token in self.stop_ids:
            self.finish_reason = "stop"
        elif len(self.token_ids) == self.new_tokens:
            self.finish_reason = "length"
        if not (self.incremental or self.params.stop):
            return  # nobody needs the text yet; `generation` decodes it at once
        self.piece += self._decode(may_stop)
        if self._stream.stopped:
            self.finish_reason = "stop"
        if self.finish_reason:
            self.piece += self._stream.finish()

    def take_piece(self) -> str:
        """The text that became certain since this was last asked."""
        piece, self.piece = self.piece, ""
        return piece

    def _decode(self, may_stop: bool) -> str:
        """Text of the tokens that the stream has not seen; a stop token has none."""
        end = len(self.token_ids)
        if self.finish_reason == "stop" and not self._stream.stopped:
            end -= 1
        start, self._decoded = self._decoded, end
        return "".join(self._stream.push(token, may_stop) for token in self.token_ids[start:end])

    def generation(self) -> Generation:
        """The answer, once finished."""
        assert self.finish_reason is not None
        if not (self.incremental or self.params.stop):
            self._decode(may_stop=False)
            self._stream.finish()
        top = None if self.params.logprobs is None else self.top_logprobs
        return Generation(self._stream.text, self.token_ids, self.logprobs, self.finish_reason, self.asked, top)


def _matcher(params: SamplingParams, tokenizer: Tokenizer) -> Matcher | None:
    return None if params.structured is None else compile_structured(params.structured, tokenizer).matcher()


def uniform_numbers(params: SamplingParams, prompt: list[int], answer: int, count: int) -> Tensor:
    """The numbers in [0, 1) that decide a request's tokens, (count,) float64; zeros for a greedy one.

    They depend on seed, prompt and answer number. Not on the seed alone: all prompts of an evaluation would share one
    luck. Not on the prompt's place in a batch: the same request would get another answer in other company."""
    if params.temperature == 0:
        return torch.zeros(count, dtype=torch.float64)
    seed = secrets.randbits(63)
    if params.seed is not None:
        key = f"{params.seed} {answer} {' '.join(map(str, prompt))}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
