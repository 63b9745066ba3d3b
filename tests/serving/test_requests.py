"""Each request ends once, with the right status: queues, deadlines, readers who leave or do not read, engines that break."""

import asyncio
import base64
import io
import json
import time
import wave

import numpy as np
import pytest
import torch
from PIL import Image

from headspring.inference import LanguageModel
from headspring.inference.engine import EngineConfig
from headspring.inference.speculation import PromptLookup
from headspring.models import Attention, Block, Encoder, Full, SwiGLU, repeat
from headspring.models.families import FAMILIES
from headspring.serving import Limits, ServerConfig, create_app
from headspring.serving.shapes import Chat, Completions, Embeddings, Error, Models, Tokens
from tests.inference.tiny import tiny_model
from tests.serving.conftest import ENGINE, Client, running

USER = [{"role": "user", "content": "hi"}]


def completion(**fields):
    return {"model": "tiny", "prompt": "def add", "max_tokens": 4, **fields}


def refused(answer, status=400, word=""):
    assert answer.status_code == status, answer.text
    assert word in Error.model_validate(answer.json()).error.message, answer.text


def events(text: str) -> list:
    """The events of a stream; every one of them is whole."""
    found = []
    for line in filter(None, text.split("\n")):
        assert line.startswith("data: ")
        found.append(line[6:] if line == "data: [DONE]" else json.loads(line[6:]))
    return found


@pytest.fixture
def long(tokenizer) -> LanguageModel:
    """A model with room for answers that take a while."""
    return LanguageModel(tiny_model(tokenizer.vocab_size, context=4096), tokenizer)


# ---- what is promised


def test_answers_have_the_shapes_of_the_description(client):
    Completions.model_validate(client.post("/v1/completions", completion(logprobs=1)).json())
    Chat.model_validate(client.post("/v1/chat/completions", {"model": "tiny", "messages": USER, "max_tokens": 2}).json())
    Embeddings.model_validate(client.post("/v1/embeddings", {"model": "tiny", "input": "a"}).json())
    Tokens.model_validate(client.post("/v1/tokenize", {"model": "tiny", "text": "a"}).json())
    Models.model_validate(client.get("/v1/models").json())


@pytest.mark.parametrize(
    "path, near, wrong",
    [
        ("/v1/completions", "max_tokens", completion(max_token=1)),
        ("/v1/chat/completions", "top_logprobs", {"model": "tiny", "messages": USER, "top_logprob": 1}),
        ("/v1/chat/completions", "content", {"model": "tiny", "messages": [{"role": "user", "contents": "x"}]}),
        ("/v1/embeddings", "input", {"model": "tiny", "inputs": "x"}),
        ("/v1/completions", "structured", completion(structure={"regex": "a"})),
    ],
)
def test_an_unknown_field_is_refused_with_the_nearest_name(client, path, near, wrong):
    refused(client.post(path, wrong), 400, f"did you mean {near}")


UNSUPPORTED = [
    completion(suffix="x"),
    completion(best_of=2, temperature=0),
    completion(n=2, best_of=1),
    completion(beam_width=2, temperature=0.5),
    completion(stream=True, best_of=3, temperature=1.0),
    completion(stream_options={"include_usage": True}),
    completion(stream=True, capture=["embed"]),
    completion(capture=["layers.9.residual.post"]),
    completion(steer=[{"site": "layers.0.residual.post", "vector": [1.0]}]),
    completion(stop_token_ids=[10**6]),
    completion(logit_bias={"x": 1}),
    completion(logit_bias={"5": 1000}),
    completion(prompt=[10**6]),
    completion(prompt=[]),
    completion(prompt=[[]]),
    completion(max_tokens=95),
    completion(prompt="x\ud800"),
    {"model": "tiny", "messages": USER, "top_logprobs": 3},
    {"model": "tiny", "messages": USER, "tools": []},
    {"model": "tiny", "messages": USER, "tool_choice": "auto"},
    {"model": "tiny", "messages": USER, "response_format": {"type": "json_schema"}},
    {"model": "tiny", "messages": USER, "max_tokens": 2, "max_completion_tokens": 3},
    {"model": "tiny", "messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]},
    {"model": "tiny", "messages": [{"role": "user", "content": "x", "name": "Bob"}]},
    {"model": "tiny", "messages": [{"role": "user", "content": None}]},
    {
        "model": "tiny",
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]}],
    },
    {"model": "tiny", "messages": []},
    {"model": "tiny", "input": "x", "dimensions": 7},
    {"model": "tiny", "input": []},
]


@pytest.mark.parametrize("body", UNSUPPORTED, ids=lambda body: json.dumps(body)[17:70])
def test_what_is_not_supported_is_refused_and_never_ignored(client, body):
    path = "/v1/embeddings" if "input" in body else "/v1/chat/completions" if "messages" in body else "/v1/completions"
    refused(client.ask("POST", path, content=json.dumps(body), headers={"Content-Type": "application/json"}), 400)


def test_tokens_there_and_back(client, lm):
    made = client.post("/v1/tokenize", {"model": "tiny", "text": "Straße 🙂", "add_bos": True}).json()
    assert made["tokens"] == lm.prompt_ids("Straße 🙂") and made["count"] == len(made["tokens"]) and made["context"] == 96
    back = client.post("/v1/detokenize", {"model": "tiny", "tokens": made["tokens"]}).json()["text"]
    assert back == "<|bos|>Straße 🙂"
    refused(client.post("/v1/detokenize", {"model": "tiny", "tokens": [10**7]}), 400, "outside")
    chat = client.post("/v1/tokenize", {"model": "tiny", "messages": USER}).json()["tokens"]
    assert chat == lm.chat_ids(USER)


def test_an_encoder_gives_embeddings_and_no_text(tokenizer):
    block = Block(mixer=Attention(heads=4, mask=Full()), feedforward=SwiGLU(hidden=64))
    value = Encoder(vocab=tokenizer.vocab_size, width=32, layers=repeat(2, block), context=96)
    encoder = LanguageModel(value.build(1), tokenizer)
    with running({"enc": encoder}) as client:
        got = client.post("/v1/embeddings", {"model": "enc", "input": ["a text", "b"]}).json()
        assert np.allclose([one["embedding"] for one in got["data"]], encoder.embed(["a text", "b"]).numpy(), atol=1e-6)
        refused(client.post("/v1/completions", {"model": "enc", "prompt": "x"}), 400, "both ways")


def test_several_models_by_name(lm, long):
    with running({"a": lm, "b": long}) as client:
        for name, model in (("a", lm), ("b", long)):
            wanted = model.generate("def add", max_tokens=6, temperature=0)[0].text
            got = client.post("/v1/completions", completion(model=name, max_tokens=6, temperature=0)).json()
            assert got["choices"][0]["text"] == wanted and got["model"] == name
        refused(client.post("/v1/completions", completion(model="a:lora")), 404, "there is a, b")


# ---- pictures and sounds


def test_a_picture_and_a_sound_are_seen(seeing):
    model = seeing.house.models["tiny"].lm.model

    def ask(parts):
        body = {"model": "tiny", "messages": [{"role": "user", "content": parts}], "max_tokens": 6, "temperature": 0}
        answer = seeing.post("/v1/chat/completions", {**body, "logprobs": True})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def picture(value):
        stream = io.BytesIO()
        Image.fromarray(np.full((8, 8), value, np.uint8)).save(stream, "PNG")
        url = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
        return {"type": "image_url", "image_url": {"url": url}}

    def sound(frequency):
        stream = io.BytesIO()
        with wave.open(stream, "wb") as out:
            out.setnchannels(1)
            out.setsampwidth(2)
            out.setframerate(8000)
            out.writeframes((8000 * np.sin(np.arange(1000) * frequency)).astype("<i2").tobytes())
        return {"type": "input_audio", "input_audio": {"data": base64.b64encode(stream.getvalue()).decode(), "format": "wav"}}

    text = {"type": "text", "text": "what is it?"}
    scores = [ask(parts)["choices"][0]["logprobs"]["content"][0]["logprob"]
              for parts in ([picture(0), text], [picture(255), text], [sound(0.1), text], [sound(1.0), text])]  # fmt: skip
    assert len(set(scores)) == 4, "what it sees and hears decides what it says"
    pieces = sum(model.config.towers[name].num_pieces for name in ("image", "sound"))
    with_both = ask([picture(0), sound(0.1), text])["usage"]["prompt_tokens"]
    assert with_both == ask([text])["usage"]["prompt_tokens"] + pieces


# ---- the ends of a request


def test_a_full_queue_is_429_with_retry_after(long):
    engine = EngineConfig(memory=8 << 20, max_sequences=1, chunk=32)
    with running({"tiny": long}, ServerConfig(max_queue=1), engine) as client:

        async def crowd():
            body = completion(max_tokens=400, ignore_eos=True)
            tasks = [asyncio.create_task(client.ask_async("POST", "/v1/completions", json=body)) for _ in range(5)]
            return list(await asyncio.gather(*tasks))

        answers = asyncio.run(crowd())
        codes = sorted(answer.status_code for answer in answers)
        assert set(codes) == {200, 429}
        for answer in answers:
            if answer.status_code == 429:
                refused(answer, 429, "waiting")
                assert int(answer.headers["retry-after"]) >= 1
        text = client.get("/metrics").text
        assert f'headspring_rejects_total{{reason="queue_full"}} {codes.count(429)}.0' in text
        assert f'headspring_requests_total{{model="tiny",outcome="rejected"}} {codes.count(429)}.0' in text


def test_what_can_never_fit_is_refused_at_once(long):
    engine = EngineConfig(memory=64 << 10, max_sequences=4, chunk=32)
    with running({"tiny": long}, ServerConfig(), engine) as client:
        refused(client.post("/v1/completions", completion(max_tokens=4000)), 400, "memory")


def test_a_timeout_is_408(long):
    with running({"tiny": long}) as client:
        refused(client.post("/v1/completions", completion(max_tokens=4000, ignore_eos=True, timeout=0.1)), 408, "timeout")
        answer = client.post("/v1/completions", completion(max_tokens=4000, ignore_eos=True, timeout=0.3, stream=True))
        assert answer.status_code == 200 and events(answer.text)[-1]["error"]["code"] == "timeout", "an error event, not [DONE]"
        assert not client.house.loop.engines["tiny"].jobs


def test_a_stream_ends_with_done_and_every_event_is_whole(client):
    answer = client.post("/v1/completions", completion(stream=True, n=2, temperature=1.0, prompt=["a", "日本語"]))
    found = events(answer.text)
    assert found[-1] == "[DONE]" and answer.headers["content-type"].startswith("text/event-stream")
    reasons = [one["choices"][0]["finish_reason"] for one in found[:-1]]
    assert sum(reason is not None for reason in reasons) == 4


class Connection:
    """One ASGI connection, whose reader leaves, or stops reading, when told."""

    def __init__(self, app, path, body, reads=10**9):
        self.app, self.path, self.body, self.reads = app, path, json.dumps(body).encode(), reads
        self.sent, self.gone, self._given = [], asyncio.Event(), False

    async def receive(self):
        if not self._given:
            self._given = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        if len(self.sent) >= self.reads:
            await asyncio.Event().wait()  # the socket's buffer is full, for ever
        self.sent.append(message)

    async def run(self):
        scope = {"type": "http", "path": self.path, "raw_path": self.path.encode(), "method": "POST", "query_string": b"",
                 "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")], "scheme": "http",
                 "http_version": "1.1", "root_path": "", "client": None, "server": ("127.0.0.1", 8000)}  # fmt: skip
        await self.app(scope, self.receive, self.send)


async def idle(client, seconds=5.0):
    """Wait until the server holds nothing."""
    engine, end = client.house.loop.engines["tiny"], time.monotonic() + seconds
    while (engine.jobs or client.house.open or client.house.loop.live) and time.monotonic() < end:
        await asyncio.sleep(0.005)
    assert not engine.jobs and not client.house.open and not client.house.loop.live
    assert engine.stats().pages_used == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_everything(long, stream):
    with running({"tiny": long}) as client:

        async def leave():
            body = completion(max_tokens=4000, ignore_eos=True, stream=stream)
            connection = Connection(client.app, "/v1/completions", body)
            task = asyncio.create_task(connection.run())
            await asyncio.sleep(0.2)
            assert client.house.loop.engines["tiny"].jobs and client.house.open
            connection.gone.set()
            await asyncio.wait_for(task, 5)
            await idle(client)

        asyncio.run(leave())
        assert 'outcome="cancelled"} 1.0' in client.get("/metrics").text


def test_a_slow_reader_is_dropped_and_stalls_nobody(long):
    limits = Limits(lag=50, reader_seconds=0.3)
    with running({"tiny": long}, ServerConfig(limits=limits)) as client:

        async def crawl():
            body = completion(max_tokens=4000, ignore_eos=True, stream=True)
            slow = asyncio.create_task(Connection(client.app, "/v1/completions", body, reads=3).run())
            await asyncio.sleep(0.1)
            quick = await client.ask_async("POST", "/v1/completions", json=completion())
            assert quick.status_code == 200
            with pytest.raises(Exception):  # noqa: B017 - the connection is dropped
                await asyncio.wait_for(slow, 5)
            await idle(client)

        asyncio.run(crawl())
        assert client.house.loop.engines["tiny"].counts["cancelled"] == 1


def test_a_request_that_breaks_fails_alone(long, monkeypatch):
    plain = long.model.logits

    def logits(hidden):
        rows = plain(hidden)
        rows[(hidden.float().abs().amax(-1) > 1e6)] = torch.nan
        return rows

    monkeypatch.setattr(long.model, "logits", logits)
    with running({"tiny": long}) as client:

        async def both():
            broken = completion(max_tokens=50, steer=[{"site": "layers.1.residual.post", "vector": [1e9] * 32}])
            good = completion(max_tokens=50, temperature=0)
            return await asyncio.gather(*(client.ask_async("POST", "/v1/completions", json=body) for body in (broken, good)))

        broken, good = asyncio.run(both())
        assert good.status_code == 200 and good.json()["usage"]["completion_tokens"] > 0
        if broken.status_code != 200:  # the last norm makes even that finite
            refused(broken, 500, "failed")
        assert client.get("/ready").status_code == 200


def test_an_engine_that_cannot_even_cancel_is_broken_and_says_so(lm, monkeypatch):
    with running({"tiny": lm}) as client:
        engine = client.house.loop.engines["tiny"]
        monkeypatch.setattr(engine, "step", lambda: 1 / 0)
        monkeypatch.setattr(engine, "cancel", lambda job: 1 / 0)
        refused(client.post("/v1/completions", completion()), 500, "failed")
        assert client.get("/ready").status_code == 503 and client.get("/health").status_code == 200
        refused(client.post("/v1/completions", completion()), 503, "restart")


def test_a_step_that_raises_fails_what_runs_and_the_next_request_is_served(lm, monkeypatch):
    with running({"tiny": lm}) as client:
        engine = client.house.loop.engines["tiny"]
        plain = engine.scheduler.schedule
        raising = iter([True])

        def schedule():
            if next(raising, False):
                raise MemoryError("no page")
            return plain()

        monkeypatch.setattr(engine.scheduler, "schedule", schedule)
        refused(client.post("/v1/completions", completion()), 500, "no page")
        assert client.post("/v1/completions", completion()).status_code == 200


# ---- stopping


def test_a_drain_lets_what_runs_finish_and_takes_nothing_new(long):
    with running({"tiny": long}) as client:

        async def drain():
            body = completion(max_tokens=300, ignore_eos=True)
            running_one = asyncio.create_task(client.ask_async("POST", "/v1/completions", json=body))
            await asyncio.sleep(0.1)
            draining = asyncio.create_task(client.house.drain())
            await asyncio.sleep(0.02)
            late = await client.ask_async("POST", "/v1/completions", json=completion())
            ready = await client.ask_async("GET", "/ready")
            health = await client.ask_async("GET", "/health")
            await draining
            return await running_one, late, ready, health

        first, late, ready, health = asyncio.run(drain())
        assert first.status_code == 200 and first.json()["usage"]["completion_tokens"] == 300
        refused(late, 503, "stopping")
        assert late.headers["retry-after"] and ready.status_code == 503 and health.status_code == 200


def test_a_drain_that_takes_too_long_cancels_the_rest(long):
    with running({"tiny": long}, ServerConfig(drain_seconds=0.1)) as client:

        async def drain():
            body = completion(max_tokens=4000, ignore_eos=True, stream=True)
            endless = asyncio.create_task(client.ask_async("POST", "/v1/completions", json=body))
            await asyncio.sleep(0.2)
            await client.house.drain()
            return await endless

        found = events(asyncio.run(drain()).text)
        assert found[-1]["error"]["code"] == "cancelled" and "stopping" in found[-1]["error"]["message"]


def test_metrics_count_what_happened(lm):
    with running({"tiny": lm}) as client:
        for _ in range(3):
            assert client.post("/v1/completions", completion(ignore_eos=True)).status_code == 200
        client.post("/v1/completions", completion(x=1))
        text = client.get("/metrics").text
        for line in (
            'headspring_requests_total{model="tiny",outcome="finished"} 3.0',
            'headspring_generated_tokens_total{model="tiny"} 12.0',
            'headspring_time_to_first_token_seconds_count{model="tiny"} 3.0',
            'headspring_time_per_token_seconds_count{model="tiny"} 3.0',
            'headspring_rejects_total{reason="unknown_field"} 1.0',
            'headspring_requests_running{model="tiny"} 0.0',
            'headspring_cache_pages_used{model="tiny"} 0.0',
        ):
            assert line in text, line


def test_metrics_count_what_was_proposed(lm):
    """Counters of the engine, under the names that are promised."""
    engine = ENGINE.model_copy(update={"speculation": PromptLookup(longest=2, shortest=1)})
    with running({"tiny": lm}, engine=engine) as client:
        body = completion(ignore_eos=True, prompt="aaaaaaaaaaaaaaaa", max_tokens=40, temperature=0)
        assert client.post("/v1/completions", body).status_code == 200
        text = client.get("/metrics").text
    counted = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("headspring_speculation"))
    name = 'headspring_speculation_{}_total{{model="tiny"}}'
    proposed, accepted = (float(counted[name.format(what)]) for what in ("proposed_tokens", "accepted_tokens"))
    assert proposed > 0 and 0 <= accepted <= proposed and float(counted[name.format("switched_off")]) >= 0


def test_two_applications_in_one_process_do_not_add_up(lm):
    first, second = (Client(create_app({"tiny": lm}, ServerConfig(), ENGINE)) for _ in range(2))
    first.post("/v1/completions", completion(x=1))
    assert "unknown_field" in first.get("/metrics").text and "unknown_field" not in second.get("/metrics").text


def in_family(name: str, vocab: int):
    """The tiny model of a family, with as many tokens as the tokenizer."""
    value = FAMILIES[name]()
    if name == "encoder_decoder":
        encoder, decoder = (side.model_copy(update={"vocab": vocab}) for side in (value.encoder, value.decoder))
        return value.model_copy(update={"encoder": encoder, "decoder": decoder, "vocab": vocab})
    return value.model_copy(update={"vocab": vocab})


@pytest.mark.parametrize("name", ["encoder_decoder", "mamba", "gru"])
def test_other_families_answer_too(name, tokenizer):
    """Models without pages run whole or with states of their own, behind the same routes."""
    lm = LanguageModel(in_family(name, tokenizer.vocab_size).build(1), tokenizer)
    wanted = [one.text for one in lm.generate(["def", "the"], max_tokens=6, temperature=1.0, seed=2)]
    with running({"other": lm}) as client:
        body = {"model": "other", "prompt": ["def", "the"], "max_tokens": 6, "temperature": 1.0, "seed": 2}
        got = client.post("/v1/completions", body).json()
        assert [one["text"] for one in got["choices"]] == wanted
        assert got["usage"]["prompt_tokens"] == len(lm.prompt_ids("def")) + len(lm.prompt_ids("the"))
