"""The application: routes, what they promise in the OpenAPI description, and how everything is put together.

    client → Guard → route → workers (tokenize, template, grammar) → engine's thread → session → JSON or events

A handler only moves things: it never tokenizes, renders or computes. Unknown paths, wrong methods and broken bodies have the
same error shape as everything else.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from headspring.artifacts import HeadspringError, UserError
from headspring.inference import LanguageModel
from headspring.inference.engine import EngineConfig
from headspring.serving import prompts, replies, requests, shapes
from headspring.serving.answers import Answering, EventStream, Gone
from headspring.serving.config import ServerConfig
from headspring.serving.errors import ApiError, of_validation, refuse
from headspring.serving.guard import KEY, Guard
from headspring.serving.loop import EngineLoop, EngineThread
from headspring.serving.metrics import CONTENT_TYPE, Metrics
from headspring.serving.served import Served, engine_names, engines_of
from headspring.serving.workers import Workers

EMBED_AT_ONCE = 8  # texts between two steps of the engines, so that an embedding of many does not stall the others' tokens


class House:
    """What the routes share: models by name, the engine's thread, workers, metrics."""

    def __init__(self, models: Mapping[str, LanguageModel], config: ServerConfig, engine: EngineConfig | None = None):
        if not models:
            raise UserError("a server needs a model")
        self.config, self.metrics = config, Metrics()
        limits = EngineConfig() if engine is None else engine
        wanted = limits.model_copy(update={"max_queue": config.max_queue})
        engines, answering = engines_of(models, wanted), engine_names(models)
        self.loop = EngineLoop(engines, self.metrics)
        self.thread = EngineThread(self.loop)
        self.models = {
            name: Served(name, lm, engines.get(answering[name]), self.loop, self.thread, config.limits, answering[name])
            for name, lm in models.items()
        }
        self.metrics.watch(lambda: {name: one.stats() for name, one in engines.items()})
        self.workers = Workers(config.workers, config.worker_queue, config.limits.worker_seconds)
        self.draining = False
        self.open: set[Answering] = set()

    def find(self, name: str) -> Served:
        """The model of that name. Raises `ApiError` 404, and 503 while the server stops."""
        if self.draining:
            raise ApiError(503, "this server is stopping", "draining", retry_after=5)
        if name not in self.models:
            known = ", ".join(self.models)
            raise ApiError(404, f"there is no model {name[:80]!r} here; there is {known}", "model_not_found", "model")
        return self.models[name]

    @property
    def ready(self) -> bool:
        return not self.draining and self.thread.alive and not self.loop.broken

    async def drain(self) -> None:
        """Take nothing more, let what runs finish for `drain_seconds`, and cancel the rest."""
        self.draining = True
        end = asyncio.get_running_loop().time() + self.config.drain_seconds
        while self.open and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)
        for answering in list(self.open):
            answering.cancel("the server is stopping")
        end = asyncio.get_running_loop().time() + 2.0
        while self.open and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)


def create_app(
    models: Mapping[str, LanguageModel], config: ServerConfig | None = None, engine: EngineConfig | None = None
) -> FastAPI:
    """The application for these models by name; `app.state.house` is what its routes share. Raises `UserError`."""
    config = config or ServerConfig()
    config.check()
    house = House(models, config, engine)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        house.thread.start()
        yield
        house.draining = True
        await asyncio.to_thread(house.thread.stop)
        house.workers.close()

    app = FastAPI(
        title="Headspring",
        version=version("headspring"),
        description="A language model behind OpenAI's API, with sampling, structure and inspection of our own.",
        lifespan=lifespan,
        swagger_ui_oauth2_redirect_url=None,
        separate_input_output_schemas=False,
    )
    app.state.house = house
    _handle_errors(app, house)
    _add_state_routes(app, house)
    _add_model_routes(app, house)
    app.add_middleware(Guard, config=config, metrics=house.metrics)
    return app


def _handle_errors(app: FastAPI, house: House) -> None:
    known = requests.field_names()

    @app.exception_handler(ApiError)
    async def told(_: Request, error: ApiError) -> Response:
        house.metrics.reject(error.reason)
        return error.response()

    @app.exception_handler(UserError)
    async def refused(request: Request, error: UserError) -> Response:
        return await told(request, refuse(str(error)))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return await told(request, of_validation(error.errors(), known))

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        what = {404: "there is no such path", 405: "this path has another method"}.get(error.status_code, str(error.detail))
        headers = dict(error.headers or {})
        return await told(request, ApiError(error.status_code, what, "http", headers=headers))

    @app.exception_handler(Gone)
    async def gone(_: Request, __: Gone) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(Exception)
    async def defect(_: Request, error: Exception) -> Response:
        message = str(error) if isinstance(error, HeadspringError) else "an error inside the server; its log says more"
        return ApiError(500, message, "internal").response()


def _add_state_routes(app: FastAPI, house: House) -> None:
    @app.get("/health", responses={200: {"model": shapes.State}}, tags=["state"])
    async def health() -> JSONResponse:
        """Whether the process lives. The only route that needs no key."""
        return JSONResponse({"status": "alive"})

    @app.get("/ready", responses={200: {"model": shapes.State}, 503: {"model": shapes.State}}, tags=["state"])
    async def ready() -> JSONResponse:
        """Whether it takes requests: not while it stops, and not with a broken engine."""
        state = "ready" if house.ready else "stopping" if house.draining else "broken"
        return JSONResponse({"status": state}, 200 if house.ready else 503)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}}, tags=["state"])
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(house.metrics.render(), media_type=CONTENT_TYPE)

    @app.get("/v1/models", responses={200: {"model": shapes.Models}}, tags=["models"])
    async def models() -> JSONResponse:
        """The models that are served."""
        return JSONResponse({"object": "list", "data": [_described(one) for one in house.models.values()]})

    @app.get("/v1/models/{name}", responses={200: {"model": shapes.Model}, 404: {"model": shapes.Error}}, tags=["models"])
    async def model(name: str) -> JSONResponse:
        """One of them."""
        if name not in house.models:
            raise ApiError(404, f"there is no model {name[:80]!r} here", "model_not_found", "model")
        return JSONResponse(_described(house.models[name]))


def _described(one: Served) -> dict[str, Any]:
    return {
        "id": one.name,
        "object": "model",
        "created": one.created,
        "owned_by": "headspring",
        "context": one.context,
        "answers": one.engine is not None,
        "parent": one.parent,
    }


def _add_model_routes(app: FastAPI, house: House) -> None:
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": shapes.Error} for status in (400, 401, 403, 404, 408, 413, 429, 431, 500, 503)
    }

    def promised(model: Any, streams: bool = False) -> dict[int | str, dict[str, Any]]:
        content = {"content": {"text/event-stream": {"schema": {"type": "string"}}}} if streams else {}
        return {200: {"model": model, **content}, **errors}

    @app.post("/v1/completions", responses=promised(shapes.Completions, True), tags=["text"])
    async def completions(body: requests.CompletionRequest, request: Request) -> Response:
        """Continue prompts."""
        served = answering_model(house, body.model)
        prepared = await house.workers.run(prompts.prepare_completion, served, body)
        form = replies.CompletionForm(body, served.lm.tokenizer)
        form.echoing([one.read for one in prepared])
        return await _answer(house, served, body, prepared, replies.Replies(body, form, "cmpl"), request)

    @app.post("/v1/chat/completions", responses=promised(shapes.Chat, True), tags=["text"])
    async def chat(body: requests.ChatRequest, request: Request) -> Response:
        """The assistant's next turn."""
        served = answering_model(house, body.model)
        prepared = await house.workers.run(prompts.prepare_chat, served, body)
        form = replies.ChatForm(body, served.lm.tokenizer)
        return await _answer(house, served, body, prepared, replies.Replies(body, form, "chatcmpl"), request)

    @app.post("/v1/embeddings", responses=promised(shapes.Embeddings), tags=["vectors"])
    async def embeddings(body: requests.EmbeddingRequest, request: Request) -> JSONResponse:
        """One vector for each text."""
        served = house.find(body.model)
        return JSONResponse(await _embed(house, served, body, request))

    @app.post("/v1/tokenize", responses=promised(shapes.Tokens), tags=["tokens"])
    async def tokenize(body: requests.TokenizeRequest) -> JSONResponse:
        """Text or a conversation as token ids."""
        served = house.find(body.model)
        tokens = await house.workers.run(prompts.tokenize, served, body)
        pieces = [replies.spelling(served.lm.tokenizer, token) for token in tokens]
        return JSONResponse({"tokens": tokens, "pieces": pieces, "count": len(tokens), "context": served.context})

    @app.post("/v1/detokenize", responses=promised(shapes.Text), tags=["tokens"])
    async def detokenize(body: requests.DetokenizeRequest) -> JSONResponse:
        """Token ids as text."""
        served = house.find(body.model)
        return JSONResponse({"text": await house.workers.run(served.lm.tokenizer.decode, list(body.tokens), "show")})


def answering_model(house: House, name: str) -> Served:
    """A model that continues text. Raises `ApiError`."""
    served = house.find(name)
    if served.engine is None:
        raise refuse(f"{name} sees both ways and continues no text; use /v1/embeddings", "model")
    if served.engine_name in house.loop.broken:
        raise ApiError(503, str(house.loop.broken[served.engine_name]), "broken", retry_after=30)
    return served


async def _answer(
    house: House,
    served: Served,
    body: requests.Asked,
    prepared: Sequence[prompts.Prepared],
    reply: replies.Replies,
    request: Request,
) -> Response:
    seconds = min(body.timeout or house.config.limits.seconds, house.config.limits.seconds)
    key = f"{request.scope.get(KEY, '') if house.config.isolate == 'key' else ''}/{body.user or ''}"
    answering = Answering(served, prepared, key=key, seconds=seconds, streamed=body.stream)
    _keep(house, answering)
    try:
        answering.start()
        if body.stream:
            await answering.begun(request)
            return EventStream(answering, reply.chunks(answering), house.config.limits.reader_seconds)
        whole = reply.whole(answering, await answering.jobs(request))
        return JSONResponse(whole)
    except BaseException:
        answering.cancel("the client has gone")
        raise


def _keep(house: House, answering: Answering) -> None:
    """Count a request among those under way until all of its sessions have ended, whatever becomes of its connection."""
    house.open.add(answering)

    async def watch() -> None:
        try:
            await answering.ended()
        finally:
            house.open.discard(answering)

    answering.watcher = asyncio.ensure_future(watch())


async def _embed(house: House, served: Served, body: requests.EmbeddingRequest, request: Request) -> dict[str, Any]:
    limits = house.config.limits
    texts = [body.input] if isinstance(body.input, str) else list(body.input)
    if not 1 <= len(texts) <= limits.texts:
        raise ApiError(400, f"input: {len(texts)} texts, and this server takes 1 to {limits.texts}", "limit", "input")
    width = served.lm.model.config.width
    if body.dimensions not in (None, width):
        raise refuse(f"dimensions={body.dimensions}, and this model's vectors have {width}", "dimensions")
    counts = await house.workers.run(prompts.count_tokens, served, texts)
    data: list[Any] = []
    end = time.monotonic() + limits.seconds
    for start in range(0, len(texts), EMBED_AT_ONCE):
        if await request.is_disconnected():
            raise Gone
        if time.monotonic() > end:
            raise ApiError(408, f"these embeddings take more than {limits.seconds:g} s", "timeout")
        some = texts[start : start + EMBED_AT_ONCE]
        work: Callable[[], Any] = lambda some=some: served.lm.embed(some)  # type: ignore[misc]
        future = house.loop.call(work)
        house.thread.wake()
        vectors = await asyncio.wrap_future(future)
        data += [replies.embedding(start + i, vector, body.encoding_format) for i, vector in enumerate(vectors)]
    usage = {"prompt_tokens": sum(counts), "total_tokens": sum(counts)}
    return {"object": "list", "data": data, "model": body.model, "usage": usage}
