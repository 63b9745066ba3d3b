"""A server in this process around a tiny model, asked through ASGI without a socket."""

import asyncio
from contextlib import contextmanager

import httpx
import pytest
import torch

from headspring.inference import LanguageModel
from headspring.inference.engine import EngineConfig
from headspring.models.audio import Sound
from headspring.models.multimodal import Multimodal
from headspring.models.vision import Vision
from headspring.serving import ServerConfig, create_app
from headspring.tokenization.tokenizer import Tokenizer
from headspring.tokenization.train import TokenizerConfig, train_tokenizer
from tests.inference.tiny import TEXT, tiny_decoder, tiny_model

ENGINE = EngineConfig(memory=4 << 20, max_sequences=8, chunk=32, debug=True)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXT, TokenizerConfig(vocab_size=300))


@pytest.fixture(scope="session")
def lm(tokenizer) -> LanguageModel:
    return LanguageModel(tiny_model(tokenizer.vocab_size), tokenizer, kind="sft")


class Client:
    """Asks an application; its engine's thread runs while the client is open."""

    def __init__(self, app, headers=None):
        self.app, self.house, self.headers = app, app.state.house, headers or {}

    def ask(self, method: str, path: str, **options) -> httpx.Response:
        return asyncio.run(self.ask_async(method, path, **options))

    async def ask_async(self, method: str, path: str, headers=None, **options) -> httpx.Response:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", timeout=30) as client:
            return await client.request(method, path, headers={**self.headers, **(headers or {})}, **options)

    def post(self, path: str, body=None, **options) -> httpx.Response:
        return self.ask("POST", path, **({"json": body} if body is not None else {}), **options)

    def get(self, path: str, **options) -> httpx.Response:
        return self.ask("GET", path, **options)


@contextmanager
def running(models, config=None, engine=ENGINE, headers=None):
    """A `Client` of a new application."""
    app = create_app(models, config or ServerConfig(), engine)
    app.state.house.thread.start()
    try:
        yield Client(app, headers)
    finally:
        app.state.house.thread.stop()
        app.state.house.workers.close()


@pytest.fixture(scope="session")
def client(lm):
    with running({"tiny": lm}) as made:
        yield made


@pytest.fixture(scope="session")
def seeing(tokenizer):
    """A server of a model that looks at pictures of 8 × 8 and hears sounds."""
    towers = {
        "image": Vision(placeholder=5, height=8, columns=8, patch=4, width=16),
        "sound": Sound(placeholder=6, samples=1024, bands=8, width=16),
    }
    value = Multimodal(decoder=tiny_decoder(tokenizer.vocab_size), towers=towers)
    model = value.build(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    with running({"tiny": LanguageModel(model, tokenizer, kind="sft")}) as made:
        yield made
