"""Encoder–decoders and models with towers, many together in one row: the answers of each alone, whatever happens on the way."""

import random

import pytest
import torch

from headspring.artifacts import UserError
from headspring.inference import LanguageModel
from headspring.inference.engine import Engine, EngineConfig
from headspring.inference.engine.cache import PAGE
from headspring.inference.engine.engine import Engine as Whole
from headspring.inference.engine.runner import RaggedRunner
from headspring.inference.sampling_params import SamplingParams
from headspring.inference.speculation import PromptLookup
from headspring.models import Attention, Block, Causal, Decoder, EncoderDecoder, Full, NoPE, SwiGLU
from headspring.models.cross_attention import CrossAttention
from headspring.models.encoder import Encoder
from headspring.models.multimodal import Multimodal
from headspring.models.soft_tokens import SoftTokens
from headspring.models.vision import Vision

from ..reference_engine import ReferenceEngine

WIDTH, CONTEXT, NEW = 32, 128, 4
SETTINGS = [{"temperature": 0.0}, {"seed": 3, "n": 3}, {"beam_width": 3, "n": 2}, {"seed": 5}]


def opinionated(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3, generator=generator)
    return model.eval()


def attention(**options) -> Attention:
    return Attention(heads=2, **options)


# ---- what an encoder reads


@pytest.fixture(scope="module")
def writer(tokenizer) -> LanguageModel:
    vocab, cross = tokenizer.vocab_size, CrossAttention(heads=2, kv_heads=1)
    read = Block(mixer=attention(mask=Full()), feedforward=SwiGLU(hidden=40))
    masks = (Causal(), Causal(window=40))
    write = tuple(Block(mixer=attention(mask=mask), cross=cross, feedforward=SwiGLU(hidden=40)) for mask in masks)
    config = EncoderDecoder(
        encoder=Encoder(vocab=vocab, width=WIDTH, layers=(read,), context=CONTEXT, head=None),
        decoder=Decoder(vocab=vocab, width=WIDTH, layers=write, context=CONTEXT),
        start=5,
    )
    return LanguageModel(opinionated(config.build(1)), tokenizer)


def check(job, answers) -> None:
    assert job.outcome == "finished", job.error
    assert [one.token_ids for one in job.generations] == [one.token_ids for one in answers]
    for one, other in zip(job.generations, answers, strict=True):
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=3e-4, rtol=1e-4)


def sources(tokenizer) -> list[list[int]]:
    luck = random.Random(4)
    return [[luck.randrange(tokenizer.vocab_size) for _ in range(length)] for length in (3, 40, 1, 17)]


def live(engine: Engine, luck: random.Random, ask, count: int):
    """Jobs that arrive between steps, some of which are cancelled; those that ended as they should."""
    jobs = []
    while len(jobs) < count or engine.jobs:
        if len(jobs) < count and luck.random() < 0.6:
            jobs.append(ask())
        if engine.jobs and luck.random() < 0.03:
            engine.cancel(luck.choice(list(engine.jobs.values())))
        engine.step()
    engine.cache.check([])
    assert engine.stats().pages_used == 0
    return [(job, key) for job, key in jobs if job.outcome != "cancelled"]


@pytest.fixture(scope="module")
def written(writer):
    """The reference's answers: by source, prompt and setting."""
    made, reference = {}, ReferenceEngine(writer)

    def of(source: tuple, prompt: tuple, setting: int):
        key = source, prompt, setting
        if key not in made:
            params = SamplingParams(max_tokens=NEW, **SETTINGS[setting])
            made[key] = reference.answers(list(prompt), params, list(source))
        return made[key]

    return of


def schedule_of_sources(writer, written, seed: int, **options) -> dict[str, int]:
    luck = random.Random(seed)
    runner = RaggedRunner(writer.model, EngineConfig())
    memory = sum(pages.bytes_per_page for pages in runner.layers) * luck.choice((6, 10, 40))
    together = luck.choice((1, 3, 8))
    chunk = max(together, luck.choice((3, 40)))
    engine = writer.engine(memory=memory, max_sequences=together, chunk=chunk, debug=True, **options)
    texts, prompts = sources(writer.tokenizer), [[5], [5, *range(60, 60 + 2 * PAGE)]]

    def ask():
        source, prompt, setting = luck.choice(texts), luck.choice(prompts), luck.randrange(len(SETTINGS))
        params = SamplingParams(max_tokens=NEW, **SETTINGS[setting])
        job = engine.submit(prompt, params, source=source, priority=luck.randrange(2))
        return job, (tuple(source), tuple(prompt), setting)

    for job, key in live(engine, luck, ask, 5):
        check(job, written(*key))
    return {"hits": engine.cache.hits, "preempted": engine.scheduler.preemptions}


def test_every_schedule_of_sources_gives_the_references_answers(writer, written):
    counted = [schedule_of_sources(writer, written, seed) for seed in range(4)]
    assert sum(one["preempted"] for one in counted) > 0 and sum(one["hits"] for one in counted) >= PAGE


def test_sources_are_read_once_for_all_answers(writer, monkeypatch):
    reads, encode = [], writer.model.encode
    monkeypatch.setattr(writer.model, "encode", lambda source: reads.append(1) or encode(source))
    engine = writer.engine(debug=True)
    engine.submit([], SamplingParams(max_tokens=3, n=4, seed=1), source=[1, 2, 3])
    engine.run()
    assert len(reads) == 1


@pytest.mark.parametrize("options", [{"cache_dtype": "int8"}, {"speculation": PromptLookup()}])
def test_other_ways_to_write_about_a_source(writer, options):
    """Speculation looks the source up, too, and changes nothing; eight bits are near."""
    source, params = sources(writer.tokenizer)[1], SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    answers = []
    for given in ({}, options):
        engine = writer.engine(debug=True, **given)
        job = engine.submit([], params, source=source)
        engine.run()
        assert job.outcome == "finished", job.error
        answers.append(job.generations[0])
    if "speculation" in options:
        assert answers[0].token_ids == answers[1].token_ids
    first = abs(answers[0].logprobs[0] - answers[1].logprobs[0])
    assert first < 0.05


def of_the_first(monkeypatch):
    """The planted bug: whoever writes looks at the source of the first."""
    real = RaggedRunner._memory

    def mistaken(runner, sequences):
        layers, memories = real(runner, sequences)
        for layer in runner.crosses:
            layers[layer].memory[:] = [layers[layer].memory[0]] * len(sequences)
        return layers, [memories[0]] * len(sequences)

    monkeypatch.setattr(RaggedRunner, "_memory", mistaken)


def without_sources(monkeypatch):
    """The planted bug: prompts that are equal share pages, whatever their sources are."""

    def submit(engine, *args, **options):
        job = real(engine, *args, **options)
        job.scope = ("", "", ())
        return job

    real = Whole.submit
    monkeypatch.setattr(Whole, "submit", submit)


@pytest.mark.parametrize("plant", [of_the_first, without_sources])
def test_control_mistaken_sources_are_noticed(writer, written, monkeypatch, plant):
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        for seed in range(4):
            schedule_of_sources(writer, written, seed)


# ---- what towers see


IMAGE = 7


@pytest.fixture(scope="module")
def seer(tokenizer) -> LanguageModel:
    seen = Block(mixer=attention(position=NoPE(), mask=Full()), feedforward=SwiGLU(hidden=40))
    tower = Vision(placeholder=IMAGE, height=12, columns=12, patch=2, width=WIDTH, blocks=(seen,))  # 36 vectors
    blocks = tuple(Block(mixer=attention(mask=mask), feedforward=SwiGLU(hidden=40)) for mask in (Causal(), Causal(window=40)))
    decoder = Decoder(vocab=tokenizer.vocab_size, width=WIDTH, layers=blocks, context=CONTEXT)
    return LanguageModel(opinionated(Multimodal(decoder=decoder, towers={"image": tower}).build(1)), tokenizer)


@torch.no_grad()
def looked(seer, seed: int) -> SoftTokens:
    picture = torch.rand(1, 1, 1, 12, 12, generator=torch.Generator().manual_seed(seed)) * 3
    return seer.model.look({"image": picture})


TEXTS = [[9] * 40 + [IMAGE] * 36 + [8], [9] * 40 + [IMAGE] * 36 + [8, 3, 1], [IMAGE] * 36 + [4]]


@pytest.fixture(scope="module")
def described(seer):
    """What the reference answers about each picture."""
    made: dict = {}

    def of(picture: int, text: int, setting: int):
        key = picture, text, setting
        if key not in made:
            prompt, params = TEXTS[text], SamplingParams(max_tokens=NEW, **SETTINGS[setting])
            reference, soft = ReferenceEngine(seer), looked(seer, picture)
            reference.log_probs = lambda ids, source=None: log_probs_of(seer, ids, len(prompt), soft)
            made[key] = reference.answers(prompt, params)
        return made[key]

    return of


@torch.no_grad()
def log_probs_of(seer, ids: list[int], prompt: int, soft: SoftTokens) -> list[float]:
    """After these, of which the first `prompt` have a picture among them; a placeholder that the model wrote is a token."""
    columns = soft.columns(ids[:prompt]) + [-1] * (len(ids) - prompt)

    def edit(x):
        for place, column in enumerate(columns):
            if column >= 0:
                x[0, place] = soft.hidden[0, column]
        return x

    with seer.model.sites.edit({"embed": edit}):
        hidden = seer.model(torch.tensor([ids]))
    return seer.model.logits(hidden)[0, -1].double().log_softmax(-1).tolist()


def schedule_of_pictures(seer, described, seed: int, **options) -> dict[str, int]:
    luck = random.Random(seed)
    memory = sum(pages.bytes_per_page for pages in RaggedRunner(seer.model, EngineConfig()).layers) * luck.choice((9, 12, 40))
    together = luck.choice((1, 3, 8))
    chunk = max(together, luck.choice((3, 40, 200)))
    engine = seer.engine(memory=memory, max_sequences=together, chunk=chunk, debug=True, **options)

    def ask():
        picture, text, setting = luck.randrange(2), luck.randrange(len(TEXTS)), luck.randrange(len(SETTINGS))
        params = SamplingParams(max_tokens=NEW, **SETTINGS[setting])
        job = engine.submit(TEXTS[text], params, soft=looked(seer, picture), priority=luck.randrange(2))
        return job, (picture, text, setting)

    for job, key in live(engine, luck, ask, 5):
        check(job, described(*key))
    return {"hits": engine.cache.hits, "preempted": engine.scheduler.preemptions}


def test_every_schedule_of_pictures_gives_the_references_answers(seer, described):
    counted = [schedule_of_pictures(seer, described, seed) for seed in range(4)]
    assert sum(one["preempted"] for one in counted) > 0 and sum(one["hits"] for one in counted) > 3 * PAGE


def test_text_before_a_picture_is_shared_and_the_picture_is_not(seer):
    engine, hits = seer.engine(debug=True), []
    for picture, text in ((0, 0), (1, 0), (1, 1), (0, 0)):
        before = engine.cache.hits
        engine.submit(TEXTS[text], SamplingParams(max_tokens=1, seed=0), soft=looked(seer, picture))
        engine.run()
        hits.append((engine.cache.hits - before) // PAGE)
    assert hits == [0, 1, 2, 2]


def test_pictures_in_eight_bits_are_near(seer):
    values = []
    for kind in ("auto", "int8"):
        engine = seer.engine(debug=True, cache_dtype=kind)
        job = engine.submit(TEXTS[1], SamplingParams(max_tokens=1, temperature=0.0, logprobs=5), soft=looked(seer, 0))
        engine.run()
        values.append(job.generations[0].logprobs[0])
    assert 0 < abs(values[0] - values[1]) < 0.05


def test_control_two_pictures_with_the_same_text_are_told_apart(seer, described, monkeypatch):
    monkeypatch.setattr(SoftTokens, "contents", lambda soft, prompt: list(prompt))
    with pytest.raises(AssertionError):
        for seed in range(4):
            schedule_of_pictures(seer, described, seed)


def test_control_a_picture_a_place_later_is_noticed(seer, described, monkeypatch):
    columns = SoftTokens.columns

    def late(soft, prompt):
        return [column + 1 if 0 <= column < 35 else column for column in columns(soft, prompt)]

    monkeypatch.setattr(Whole, "_job", lambda engine, *rest: shifted(real(engine, *rest), late))
    with pytest.raises(AssertionError):
        schedule_of_pictures(seer, described, 0)


def shifted(job, columns):
    job.columns = columns(job.soft, job.prompt)
    return job


real = Whole._job


def test_what_the_model_writes_is_text(seer):
    """A placeholder among proposals, or in the answer, is a token like any other: no picture is left for it."""
    soft, params = looked(seer, 0), SamplingParams(max_tokens=6, temperature=0.0, logit_bias={IMAGE: 100.0})
    answers = []
    for options in ({}, {"speculation": PromptLookup()}):
        engine = seer.engine(debug=True, **options)
        job = engine.submit(TEXTS[2], params, soft=soft)
        engine.run()
        assert job.outcome == "finished", job.error
        answers.append(job.generations[0])
    assert answers[0].token_ids == answers[1].token_ids == [IMAGE] * 6
    expected = log_probs_of(seer, TEXTS[2] + [IMAGE] * 5, len(TEXTS[2]), soft)[IMAGE]
    assert answers[0].logprobs[5] == pytest.approx(expected, abs=3e-4)


def test_pictures_and_placeholders_must_fit(seer):
    for text in ([IMAGE] * 35 + [1], [IMAGE] * 37 + [1]):
        with pytest.raises(UserError, match="placeholders"):
            seer.engine().submit(text, SamplingParams(), soft=looked(seer, 0))
