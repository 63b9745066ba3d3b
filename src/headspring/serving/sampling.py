"""A request's fields → `SamplingParams`, within the server's bounds. What it may not have is refused with the bound's name."""

import json
from collections.abc import Mapping
from typing import Any

from headspring.inference.inspection import Inspection
from headspring.inference.sampling import SamplingParams
from headspring.inference.structured import Structured
from headspring.serving.config import Limits
from headspring.serving.errors import ApiError, refuse
from headspring.serving.requests import Asked, ChatRequest, CompletionRequest, ResponseFormat

SAME = (  # fields that `SamplingParams` has under the same name
    *("min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("seed", "n", "best_of", "beam_width", "length_penalty", "early_stopping", "stop", "stop_token_ids", "ignore_eos"),
)
INSPECTION = ("capture", "lens", "patch", "ablate", "steer")


def params_of(body: Asked, limits: Limits, room: int) -> SamplingParams:
    """What `body` asks for; `room` tokens of the context are left after its prompt. Raises `ApiError` or `UserError`."""
    options = {name: value for name in SAME if (value := getattr(body, name)) is not None}
    if body.logit_bias is not None:
        options["logit_bias"] = _biases(body.logit_bias, limits)
    options["max_tokens"] = _max_tokens(body, limits, room)
    options |= _logprobs(body, limits)
    if (structured := _structured(body, limits)) is not None:
        options["structured"] = structured
    params = SamplingParams.of(**options)
    _check(params, limits)
    if body.stream and params.answers > params.n:
        raise refuse("best_of and beam_width choose among whole answers; leave stream out", "stream")
    if body.stream_options is not None and not body.stream:
        raise refuse("stream_options without stream; set stream to true", "stream_options")
    return params


def inspection_of(body: Asked, limits: Limits) -> Inspection | None:
    """What the request wants to see and to change inside; None where nothing."""
    fields = {name: value for name in INSPECTION if (value := getattr(body, name)) is not None}
    if not fields:
        return None
    asked = Inspection.of(**fields)
    if body.stream and asked.looks:
        raise refuse("capture and lens come with a whole answer; leave stream out", "stream")
    count = len(asked.capture) + len(asked.edits) + (len(asked.lens.sites) if asked.lens else 0)
    _at_most(count, limits.edits, "capture, lens, patch, ablate and steer", "sites")
    if asked.lens is not None:
        _at_most(asked.lens.top, limits.logprobs, "lens.top")
    numbers = sum(len(text) * 3 // 16 for text in _vectors(asked))
    _at_most(numbers, limits.edit_numbers, "patch, ablate and steer", "numbers")
    return asked


def _vectors(asked: Inspection) -> list[str]:
    """The base64 of all edits; 16 characters hold 3 float32."""
    means = [one.mean for one in asked.ablate if one.mean is not None]
    return [one.values for one in asked.patch] + [one.vector for one in asked.steer] + means


def _max_tokens(body: Asked, limits: Limits, room: int) -> int:
    asked = body.max_tokens
    if isinstance(body, ChatRequest) and body.max_completion_tokens is not None:
        if asked is not None and asked != body.max_completion_tokens:
            raise refuse("max_tokens and max_completion_tokens differ; give one of them", "max_completion_tokens")
        asked = body.max_completion_tokens
    if asked is None:
        asked = 16 if isinstance(body, CompletionRequest) else room  # OpenAI's defaults
        return max(1, min(asked, room, limits.max_tokens))
    _at_most(asked, limits.max_tokens, "max_tokens")
    if asked > max(room, 0):
        raise refuse(f"max_tokens={asked}, and the context has room for {max(room, 0)} after this prompt", "max_tokens")
    return asked


def _logprobs(body: Asked, limits: Limits) -> dict[str, Any]:
    """Chat says whether and how many; completions say how many."""
    found: dict[str, Any] = {}
    if isinstance(body, ChatRequest):
        if body.top_logprobs is not None and not body.logprobs:
            raise refuse("top_logprobs needs logprobs: true", "top_logprobs")
        found = {"logprobs": body.top_logprobs or 0} if body.logprobs else {}
    if isinstance(body, CompletionRequest):
        found = {} if body.logprobs is None else {"logprobs": body.logprobs}
        if body.prompt_logprobs is not None:
            if body.stream:
                raise refuse("prompt_logprobs come with a whole answer; leave stream out", "stream")
            found["prompt_logprobs"] = body.prompt_logprobs
        elif body.echo and body.logprobs is not None:
            found["prompt_logprobs"] = body.logprobs
    for name, count in found.items():
        _at_most(count, limits.logprobs, name)
    return found


def _biases(given: Mapping[str, float], limits: Limits) -> dict[int, float]:
    _at_most(len(given), limits.logit_bias, "logit_bias", "entries")
    try:
        biases = {int(token): float(value) for token, value in given.items()}
    except ValueError:
        raise refuse("logit_bias maps token ids to numbers", "logit_bias") from None
    if any(not -100 <= value <= 100 for value in biases.values()):
        raise refuse("logit_bias: each value lies in −100 … 100", "logit_bias")
    return biases


def _structured(body: Asked, limits: Limits) -> Structured | None:
    found = body.structured
    if isinstance(body, ChatRequest) and body.response_format is not None:
        wanted = _of_format(body.response_format)
        if wanted is not None and found is not None:
            raise refuse("give response_format or structured, not both", "structured")
        found = wanted or found
    if found is not None:
        size = len(json.dumps(found.model_dump(), ensure_ascii=False).encode("utf-8", "surrogatepass"))
        _at_most(size, limits.schema_bytes, "structured output", "bytes")
    return found


def _of_format(wanted: ResponseFormat) -> Structured | None:
    if (wanted.type == "json_schema") != (wanted.json_schema is not None):
        raise refuse("json_schema belongs to response_format of type json_schema, and that needs it", "response_format")
    if wanted.type == "text":
        return None
    if wanted.json_schema is None:
        return Structured(json_schema={"type": "object"})
    if wanted.json_schema.strict is False:
        raise refuse("strict: false is not supported; answers always keep to the schema", "response_format.json_schema.strict")
    return Structured(json_schema=wanted.json_schema.schema_)


def _check(params: SamplingParams, limits: Limits) -> None:
    _at_most(params.answers, limits.answers, "n, best_of and beam_width", "answers")
    _at_most(len(params.stop), limits.stop, "stop", "strings")
    _at_most(len(params.stop_token_ids), limits.stop, "stop_token_ids", "ids")
    for text in params.stop:
        _at_most(len(text.encode("utf-8", "surrogatepass")), limits.stop_bytes, "a stop string", "bytes")


def _at_most(count: int, most: int, what: str, unit: str = "") -> None:
    if count > most:
        raise ApiError(400, f"{what}: {count} {unit}".rstrip() + f", and this server allows {most}", "limit")
