"""Schemathesis asks whatever the published OpenAPI description allows, and much that it does not: no answer is a 5xx."""

import asyncio
from itertools import count

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from headspring.serving import Limits, ServerConfig, create_app
from headspring.serving.shapes import Error
from tests.serving.conftest import ENGINE


@pytest.fixture(scope="module")
def app(lm):
    config = ServerConfig(limits=Limits(seconds=2.0, worker_seconds=2.0, max_tokens=64))
    made = create_app({"tiny": lm}, config, ENGINE.model_copy(update={"debug": False}))
    made.state.house.thread.start()

    async def without_lifespan(scope, receive, send):  # a client of one request would start and stop the engine around it
        if scope["type"] != "lifespan":
            return await made(scope, receive, send)
        for part in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{part}.complete"})

    yield without_lifespan
    made.state.house.thread.stop()


def ask_everything(app, examples: int, modes) -> set[int]:
    """The statuses of all answers."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers={"Host": "localhost"})
    seen: set[int] = set()
    asked = count()

    def check(case):
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str) and next(asked) % 4:
            case.body["model"] = "tiny"  # a name that nobody guesses
        answer = case.call(headers={"Host": "localhost"})
        seen.add(answer.status_code)
        assert answer.status_code < 500, (case.as_curl_command(), answer.text[:300])
        if answer.status_code >= 400:
            Error.model_validate(answer.json())

    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.path in ("/ready", "/metrics", "/health") and examples < 50:
            continue
        for mode in modes:
            if mode is GenerationMode.NEGATIVE and not operation.body:
                continue  # nothing can be wrong

            @settings(max_examples=examples, deadline=None, database=None, derandomize=True,
                      phases=[Phase.generate], suppress_health_check=list(HealthCheck))  # fmt: skip
            def run(case):
                check(case)

            strategy = operation.as_strategy(generation_mode=mode)
            given(case=strategy)(run)()
    return seen


def test_no_5xx_for_a_few(app):
    seen = ask_everything(app, 6, [GenerationMode.NEGATIVE])
    assert 400 in seen


@pytest.mark.slow
def test_no_5xx_for_many(app):
    seen = ask_everything(app, 60, [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
    assert {200, 400} <= seen


def test_the_description_names_every_path(app):
    async def get():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return (await client.get("/openapi.json")).json()

    paths = asyncio.run(get())["paths"]
    assert set(paths) == {
        "/health", "/ready", "/metrics", "/v1/models", "/v1/models/{name}", "/v1/completions", "/v1/chat/completions",
        "/v1/embeddings", "/v1/tokenize", "/v1/detokenize",
    }  # fmt: skip
