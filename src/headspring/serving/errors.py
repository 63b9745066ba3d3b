"""Errors as OpenAI's API gives them: a status and {"error": {message, type, param, code}}. One place says which is which."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from fastapi.responses import JSONResponse

TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
TYPES |= {405: "invalid_request_error", 413: "invalid_request_error", 431: "invalid_request_error", 408: "timeout_error"}
TYPES |= {429: "rate_limit_error", 503: "unavailable_error"}


@dataclass
class ApiError(Exception):
    """What a client is told. `reason` is a short name for the metrics; `param` the field that was wrong."""

    status: int
    message: str
    reason: str = "invalid"
    param: str | None = None
    retry_after: float | None = None  # seconds
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.reason}}

    def response(self) -> JSONResponse:
        headers = dict(self.headers)
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        return JSONResponse(self.body(), self.status, headers)


def refuse(message: str, param: str | None = None, reason: str = "invalid") -> ApiError:
    """A request that cannot be served as it stands: 400."""
    return ApiError(400, message, reason, param)


def of_validation(errors: Sequence[Mapping[str, Any]], known: Iterable[str]) -> ApiError:
    """The most telling of pydantic's errors as one line: an unknown field may be why another one is missing. `known`: the names
    of all fields."""
    error = min(errors, key=lambda one: one["type"] != "extra_forbidden")
    place = [str(part) for part in error["loc"] if part != "body"]
    where = ".".join(place) or "the body"
    if error["type"] == "extra_forbidden":
        near = get_close_matches(place[-1], sorted(known), n=1)
        return refuse(f"unknown field {where}" + (f"; did you mean {near[0]}?" if near else ""), where, "unknown_field")
    if error["type"] == "json_invalid":
        return refuse("the body is not JSON", reason="not_json")
    if error["type"] == "missing":
        return refuse(f"{where} is missing", where)
    said = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return refuse(f"{where}: {said[:1].lower()}{said[1:200]}", where)
