"""What is sent back, in OpenAI's shapes: whole answers, chunks of streams, log-probabilities, usage, what was seen inside."""

import base64
import math
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from headspring.inference import Generation
from headspring.inference.engine import Job, Update
from headspring.serving.answers import Answering
from headspring.serving.requests import Asked, ChatRequest, CompletionRequest
from headspring.serving.tools import Calls
from headspring.tokenization.tokenizer import Tokenizer

Json = dict[str, Any]
SMALLEST = -9999.0  # stands for minus infinity, which JSON does not have; OpenAI's own number


class Form(Protocol):
    """How one route spells an answer."""

    kind: str
    chunk_kind: str

    def choice(self, index: int, answer: Generation, job: Job) -> Json: ...

    def first(self, index: int) -> list[Json]: ...

    def delta(self, index: int, update: Update) -> list[Json]: ...


class Replies:
    """The envelope around choices: one id for a request and all its chunks."""

    def __init__(self, body: Asked, form: Form, prefix: str):
        self.body, self.form = body, form
        self.id, self.created = f"{prefix}-{secrets.token_hex(12)}", int(time.time())

    def whole(self, answering: Answering, jobs: Sequence[Job]) -> Json:
        """The answer to a request that does not stream."""
        answers = [(job, one) for job in jobs for one in job.generations]
        choices = [self.form.choice(index, answer, job) for index, (job, answer) in enumerate(answers)]
        return self._envelope(self.form.kind, choices) | {"usage": usage(answering)}

    async def chunks(self, answering: Answering) -> AsyncIterator[Json]:
        """The same in pieces."""
        n = answering.prepared[0].params.n
        counts = bool(self.body.stream_options and self.body.stream_options.include_usage)
        extra: Json = {"usage": None} if counts else {}
        begun: set[int] = set()
        async for prompt, update in answering.updates():
            index = prompt * n + update.answer
            if index not in begun:
                begun.add(index)
                for choice in self.form.first(index):
                    yield self._envelope(self.form.chunk_kind, [choice]) | extra
            for choice in self.form.delta(index, update):
                yield self._envelope(self.form.chunk_kind, [choice]) | extra
        if counts:
            yield self._envelope(self.form.chunk_kind, []) | {"usage": usage(answering)}

    def _envelope(self, kind: str, choices: list[Json]) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.body.model, "choices": choices}


def usage(answering: Answering) -> Json:
    """Tokens that were read and made; those of answers that best_of dropped count, since they were made."""
    read = sum(len(one.read) for one in answering.prepared)
    made = sum(session.num_tokens for session in answering.sessions)
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


class CompletionForm:
    """`/v1/completions`: plain text, log-probabilities as parallel lists."""

    kind = chunk_kind = "text_completion"

    def __init__(self, body: CompletionRequest, tokenizer: Tokenizer):
        self.body, self.tokenizer = body, tokenizer
        self._written: dict[int, int] = {}  # characters of each choice so far
        self._prompts: list[str] = []

    def echoing(self, prompts: Sequence[Sequence[int]]) -> None:
        """Remember the prompts' text, for `echo`."""
        self._prompts = [self.tokenizer.decode(prompt) for prompt in prompts] if self.body.echo else []

    def choice(self, index: int, answer: Generation, job: Job) -> Json:
        text, echoed = answer.text, self._echo(index)
        logprobs = None
        if self.body.logprobs is not None:
            ids, values, tops = answer.token_ids, answer.logprobs, answer.top_logprobs or []
            logprobs = self._logprobs(ids, values, tops, len(echoed))
            if self.body.echo:
                logprobs = _joined(self._of_prompt(job), logprobs)
        choice: Json = {"text": echoed + text, "index": index, "logprobs": logprobs, "finish_reason": answer.finish_reason}
        if self.body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(job, self.tokenizer)
        return choice | inspected(self.body, job, index % job.params.n, self.tokenizer)

    def first(self, index: int) -> list[Json]:
        text = self._echo(index)
        self._written[index] = len(text)
        return [{"text": text, "index": index, "logprobs": None, "finish_reason": None}] if text else []

    def delta(self, index: int, update: Update) -> list[Json]:
        if not (update.text or update.finish_reason or (self.body.logprobs is not None and update.token_ids)):
            return []
        logprobs = None
        if self.body.logprobs is not None:
            begin = self._written[index]
            logprobs = self._logprobs(update.token_ids, update.logprobs, update.top_logprobs or [], begin)
        self._written[index] += len(update.text)
        return [{"text": update.text, "index": index, "logprobs": logprobs, "finish_reason": update.finish_reason}]

    def _echo(self, index: int) -> str:
        return self._prompts[index // (self.body.n or 1)] if self._prompts else ""

    def _logprobs(self, ids: Sequence[int], values: Sequence[float], tops: Sequence[Any], begin: int) -> Json:
        pieces = [spelling(self.tokenizer, token) for token in ids]
        offsets, place = [], begin
        for piece in pieces:
            offsets.append(place)
            place += len(piece)
        return {
            "tokens": pieces,
            "token_logprobs": [finite(value) for value in values],
            "top_logprobs": [{spelling(self.tokenizer, i): finite(v) for i, v in best(top)} for top in tops] or None,
            "text_offset": offsets,
        }

    def _of_prompt(self, job: Job) -> Json:
        made = self._logprobs(job.prompt, [], [], 0)
        tops = [None, *({spelling(self.tokenizer, i): finite(v) for i, v in best(top)} for top in job.prompt_tops)]
        values = [None, *map(finite, job.prompt_logprobs)]
        return made | {"token_logprobs": values, "top_logprobs": tops if self.body.logprobs else None}


class ChatForm:
    """`/v1/chat/completions`: messages, tool calls, log-probabilities token by token."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, body: ChatRequest, tokenizer: Tokenizer):
        self.body, self.tokenizer = body, tokenizer
        self._calls: dict[int, Calls] = {}

    def choice(self, index: int, answer: Generation, job: Job) -> Json:
        reader = Calls(self.body)
        shown = reader.push(answer.text)
        rest, calls = reader.finish()
        message: Json = {"role": "assistant", "content": (shown + rest) or (None if calls else "")}
        if calls:
            message["tool_calls"] = calls
        logprobs = self._logprobs(answer.token_ids, answer.logprobs, answer.top_logprobs or [])
        reason = "tool_calls" if calls and answer.finish_reason == "stop" else answer.finish_reason
        choice: Json = {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}
        return choice | inspected(self.body, job, index, self.tokenizer)

    def first(self, index: int) -> list[Json]:
        self._calls[index] = Calls(self.body)
        delta = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def delta(self, index: int, update: Update) -> list[Json]:
        reader = self._calls[index]
        text, reason = reader.push(update.text), update.finish_reason
        calls: list[Json] = []
        if reason is not None:
            rest, calls = reader.finish()
            text += rest
        logprobs = self._logprobs(update.token_ids, update.logprobs, update.top_logprobs or [])
        choices = []
        if text or logprobs is not None:
            choices.append({"index": index, "delta": {"content": text}, "logprobs": logprobs, "finish_reason": None})
        if calls:
            delta = {"tool_calls": [{"index": number, **call} for number, call in enumerate(calls)]}
            choices.append({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})
        if reason is not None:
            reason = "tool_calls" if calls and reason == "stop" else reason
            choices.append({"index": index, "delta": {}, "logprobs": None, "finish_reason": reason})
        return choices

    def _logprobs(self, ids: Sequence[int], values: Sequence[float], tops: Sequence[Any]) -> Json | None:
        if not self.body.logprobs or not ids:
            return None
        rows: Sequence[Any] = tops if self.body.top_logprobs else [{}] * len(ids)
        content = [
            self._token(token, value) | {"top_logprobs": [self._token(i, v) for i, v in best(top)]}
            for token, value, top in zip(ids, values, rows, strict=True)
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, value: float) -> Json:
        raw = self.tokenizer.token_bytes(token) if token < self.tokenizer.vocab_size else b""
        return {"token": raw.decode("utf-8", "replace"), "logprob": finite(value), "bytes": list(raw)}


# ---- pieces


def spelling(tokenizer: Tokenizer, token: int) -> str:
    """A token as text; bytes that are no whole character by their values, so that different tokens differ."""
    raw = tokenizer.token_bytes(token) if token < tokenizer.vocab_size else b""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def finite(value: float) -> float:
    return max(SMALLEST, float(value)) if not math.isnan(value) else SMALLEST


def best(top: Mapping[int, float] | None) -> list[tuple[int, float]]:
    """Most likely ids with their log-probabilities; none where none were asked for."""
    return list(top.items()) if top else []


def prompt_logprobs(job: Job, tokenizer: Tokenizer) -> list[Json | None]:
    """For each token of the prompt its log-probability and the likeliest others; None for one that nothing stands before."""
    told = zip(job.prompt[1:], job.prompt_logprobs, job.prompt_tops, strict=True)
    return [
        None,
        *(
            {
                "token": spelling(tokenizer, token),
                "logprob": finite(value),
                "top_logprobs": {spelling(tokenizer, i): finite(v) for i, v in best(top)},
            }
            for token, value, top in told
        ),
    ]


def _joined(first: Json, second: Json) -> Json:
    return {name: None if first[name] is None or second[name] is None else first[name] + second[name] for name in first}


def inspected(body: Asked, job: Job, answer: int, tokenizer: Tokenizer) -> Json:
    """What an answer saw of itself: activations as base64 of little-endian float32 with their shape, and readings of a lens."""
    if body.capture is None and body.lens is None:
        return {}
    seen = job.seen[answer]
    captured = {name: {"shape": list(rows.shape), "float32": packed(rows)} for name, rows in seen.activations.items()}
    lens = {
        name: [
            [{"token": spelling(tokenizer, i), "logprob": finite(v)} for i, v in zip(ids, values)]
            for ids, values in zip(one.ids.tolist(), one.logprobs.tolist())
        ]
        for name, one in seen.lens.items()
    }
    return {"inspection": {"capture": captured, "lens": lens}}


def packed(rows: torch.Tensor) -> str:
    return base64.b64encode(rows.float().cpu().contiguous().numpy().astype("<f4").tobytes()).decode()


def embedding(index: int, vector: torch.Tensor, form: str) -> Mapping[str, Any]:
    value = packed(vector) if form == "base64" else vector.tolist()
    return {"object": "embedding", "index": index, "embedding": value}
