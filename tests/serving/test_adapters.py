"""One engine, three names: a base and its LoRA adapters, asked at the same time with the official client."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from headspring.inference import LanguageModel
from headspring.inference.engine import Engine
from headspring.inference.sampling_params import SamplingParams
from headspring.serving import ServerConfig
from headspring.serving.server import Server
from tests.inference.tiny import tiny_model
from tests.models.adapters import narrow, random_adapter
from tests.serving.conftest import ENGINE, running

NAMES = ("tiny", "poet", "clerk")
PROMPT = "the quick brown fox jumps over the lazy dog " * 2


@pytest.fixture(scope="module")
def models(tokenizer):
    model = narrow(tiny_model(tokenizer.vocab_size, width=128, context=160))
    lm = LanguageModel(model, tokenizer)
    ranks = {"poet": 4, "clerk": 20}
    adapters = {name: lm.with_adapter(random_adapter(model, rank, seed=rank)) for name, rank in ranks.items()}
    return {"tiny": lm, **adapters}


@pytest.fixture(scope="module")
def client(models):
    server = Server.of(models, ServerConfig(port=0), ENGINE)
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)
    server.house.draining = True
    thread.join(20)
    assert not thread.is_alive()


def test_all_names_are_listed_with_their_base(client):
    listed = {model.id: model for model in client.models.list()}
    assert tuple(listed) == NAMES
    assert [listed[name].model_extra["parent"] for name in NAMES] == [None, "tiny", "tiny"]


def test_answers_together_are_answers_alone(client, models):
    def ask(name):
        return client.completions.create(model=name, prompt=PROMPT, max_tokens=16, temperature=0, logprobs=0)

    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(ask, NAMES * 2))
    wanted = {name: models[name].generate(PROMPT, max_tokens=16, temperature=0)[0] for name in NAMES}
    assert len({one.text for one in wanted.values()}) == len(NAMES), "adapters that change nothing prove nothing"
    for name, answer in zip(NAMES * 2, together, strict=True):
        assert answer.model == name and answer.choices[0].text == wanted[name].text
        assert answer.choices[0].logprobs.token_logprobs == pytest.approx(wanted[name].logprobs, abs=1e-4)


def test_embeddings_have_the_adapter_too(client, models):
    vectors = {name: client.embeddings.create(model=name, input="a fox").data[0].embedding for name in NAMES}
    for name, vector in vectors.items():
        assert vector == pytest.approx(models[name].embed("a fox")[0].tolist(), abs=1e-6)
    assert vectors["tiny"] != vectors["poet"] != vectors["clerk"]


def test_an_unknown_name_is_a_404_that_names_all(client):
    with pytest.raises(openai.NotFoundError, match="tiny, poet, clerk"):
        client.completions.create(model="painter", prompt="a", max_tokens=1)


def test_one_engine_answers_for_all(models):
    with running(models) as client:
        assert len({id(served.engine) for served in client.house.models.values()}) == 1
    alone = {name: models[name] for name in ("poet", "clerk")}
    with running(alone) as client:  # a base that is not served by a name of its own
        engines = {id(served.engine) for served in client.house.models.values()}
        assert len(engines) == 1 and [served.parent for served in client.house.models.values()] == [None, None]
        body = {"model": "clerk", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
        assert client.post("/v1/completions", body).json()["choices"][0]["text"] == (
            models["clerk"].generate(PROMPT, max_tokens=8, temperature=0)[0].text
        )


def cached_tokens(models):
    """Prefix hits when every name is asked the same, twice over: the first time and the second."""
    engine = Engine(models["tiny"].model, models["tiny"].tokenizer, ENGINE.model_copy(update={"memory": 16 << 20}),
                    adapters={name: models[name].adapter for name in NAMES[1:]})  # fmt: skip

    hits, texts, prompt, params = [], [], list(range(20, 100)), SamplingParams.of(max_tokens=4, temperature=0)
    for _ in range(2):
        for name in NAMES:
            job = engine.submit(prompt, params, adapter=None if name == "tiny" else name)
            engine.run()
            texts.append(job.generations[0].text)
        hits.append(engine.stats().prefix_hits - sum(hits))
    return hits, texts


def test_adapters_share_no_pages(models, monkeypatch):
    hits, texts = cached_tokens(models)
    assert hits[0] == 0 and hits[1] > 0 and hits[1] % (32 * len(NAMES)) == 0 and texts[:3] == texts[3:]
    # Planted: an adapter that is no part of where a prefix begins. The second name then reads the first one's keys and values.
    for name in NAMES[1:]:
        monkeypatch.setitem(vars(models[name].adapter), "key", "")
    hits, mixed = cached_tokens(models)
    assert hits[0] > 0 and mixed[:3] != texts[:3]


def test_adapters_of_two_keys_share_no_pages(models):
    config = ServerConfig(port=0, keys=("one-key-that-is-long-enough", "two-key-that-is-long-enough"))
    body = {"model": "poet", "prompt": list(range(20, 100)), "max_tokens": 2, "temperature": 0}
    with running(models, config) as client:
        hits = lambda: client.house.models["poet"].engine.stats().prefix_hits
        for key, more in (("one", False), ("two", False), ("one", True)):
            before = hits()
            answer = client.post("/v1/completions", body, headers={"authorization": f"Bearer {key}-key-that-is-long-enough"})
            assert answer.status_code == 200 and (hits() > before) == more
