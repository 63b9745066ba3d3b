"""Requests that look inside or change what is inside, beside others that do not, against one naive uncached pass each."""

import base64
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from headspring.artifacts import UserError
from headspring.inference import LanguageModel, SamplingParams
from headspring.inference.engine import Engine, EngineConfig
from headspring.inference.generation import uniform_numbers
from headspring.inference.inspection import Inspection, Probe, watching
from headspring.inference.sampling import RowParams, pick
from headspring.inference.speculation import PromptLookup
from headspring.models import Attention, Block, Mamba, SwiGLU, kernels
from headspring.models.families import FAMILIES
from headspring.models.ragged import Ragged
from headspring.models.scoring import log_probs
from tests.inference.tiny import tiny_model
from tests.models.conftest import randomise

WIDTH, HEADS, CHANNELS, NEW = 32, 4, 8, 9
PROMPT = [(7 * place) % 120 for place in range(40)]
VECTOR = [0.3 * (-1) ** channel for channel in range(WIDTH)]
GREEDY = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=NEW, temperature=1.5, seed=5, ignore_eos=True)
STREAM, HEAD = "layers.0.residual.post", "layers.1.mixer.heads"


def steered(start):
    def edit(x):
        x = x.clone()
        x[:, start:] += 2.0 * torch.tensor(VECTOR)
        return x

    return edit


def patched(x):
    x = x.clone()
    x[:, 39] = 1.0
    return x


def ablated(x):
    x = x.clone()
    x[:, :, [1, 3]] = 0.0
    return x


def mean_ablated(x):
    x = x.clone()
    x[:, :, 2, :] = torch.arange(CHANNELS) / 8
    return x


MEAN = torch.zeros(HEADS, CHANNELS)
MEAN[2] = torch.arange(CHANNELS) / 8
EDITS = {  # what a request says, and the same as a function of the whole activation
    "steer": (Inspection(steer=[{"site": STREAM, "vector": VECTOR, "scale": 2.0}]), {STREAM: steered(0)}),
    "steer the answer": (
        Inspection(steer=[{"site": STREAM, "vector": VECTOR, "scale": 2.0, "start": -1}]),
        {STREAM: steered(39)},
    ),
    "patch": (Inspection(patch=[{"site": STREAM, "positions": [-1], "values": [1.0] * WIDTH}]), {STREAM: patched}),
    "ablate heads": (Inspection(ablate=[{"site": HEAD, "heads": [1, 3]}]), {HEAD: ablated}),
    "ablate to a mean": (Inspection(ablate=[{"site": HEAD, "heads": [2], "mean": MEAN}]), {HEAD: mean_ablated}),
}


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model(tokenizer.vocab_size).eval()


@dataclass
class Answer:
    tokens: list[int]
    logprobs: list[float]


@torch.inference_mode()
def naive(model, prompt, params, edits=None) -> Answer:
    """One token at a time, everything computed again for each."""
    tokens, logprobs = list(prompt), []
    uniforms = uniform_numbers(params, list(prompt), 0, params.max_tokens)
    for place in range(params.max_tokens):
        with model.sites.edit(edits or {}):
            logits = model.logits(model(torch.tensor([tokens]))[:, -1])
        token = int(pick(logits, RowParams.of([params], logits.shape[-1]), uniforms[place : place + 1]))
        logprobs.append(float(logits.log_softmax(-1)[0, token]))
        tokens.append(token)
    return Answer(tokens[len(prompt) :], logprobs)


@torch.inference_mode()
def whole(model, tokens, sites, edits=None):
    """Activations (T, …) of one pass over the tokens."""
    with model.sites.edit(edits or {}), model.sites.capture(sites) as seen:
        model(torch.tensor([tokens]))
    return {site: value[0] for site, value in seen.items()}


def serve(model, tokenizer, asked, **config):
    """Jobs for (prompt, params, inspection) triples that run together."""
    engine = Engine(
        model, tokenizer, EngineConfig(**{"debug": True, "max_sequences": min(8, config.get("chunk", 8)), **config})
    )
    jobs = [engine.submit(prompt, params, edits=inspection) for prompt, params, inspection in asked]
    engine.run()
    return jobs, engine


CONFIGS = [{}, {"chunk": 7}, {"chunk": 33, "max_sequences": 2}]


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_an_edited_answer_is_the_naive_one(model, tokenizer, name, config):
    """Edited and untouched requests with the same prompt, side by side: prefixes may be shared only between equals."""
    inspection, functions = EDITS[name]
    asked = [(PROMPT, params, one) for params in (GREEDY, DRAWN) for one in (None, inspection, None, inspection)]
    jobs, _ = serve(model, tokenizer, asked, **config)
    for job, (_, params, one) in zip(jobs, asked):
        expected = naive(model, PROMPT, params, None if one is None else functions)
        assert job.generations[0].token_ids == expected.tokens
        assert job.generations[0].logprobs == pytest.approx(expected.logprobs, abs=1e-3)
    untouched, edited = (naive(model, PROMPT, GREEDY, edits) for edits in (None, functions))
    assert untouched.logprobs != pytest.approx(edited.logprobs, abs=1e-2), "this edit changes nothing: it tests nothing"


@pytest.mark.parametrize("config", [*CONFIGS, {"chunk": 7, "memory": 1}], ids=str)
def test_captures_are_what_one_pass_shows(model, tokenizer, config):
    if config.get("memory"):  # so few pages that sequences are preempted
        config["memory"] = 5 * sum(pool.bytes_per_page for pool in model.new_pages(1))
    sites = [STREAM, "layers.1.attention.q", "layers.1.mlp.act", "embed", "final"]
    looking = Inspection(capture=sites)
    both = Inspection(capture=sites, steer=EDITS["steer"][0].steer)
    asked = [(PROMPT, DRAWN, looking), (PROMPT, DRAWN, None), (PROMPT, DRAWN, both), (PROMPT[:5], DRAWN, looking)]
    jobs, _ = serve(model, tokenizer, asked, **config)
    for job, (prompt, _, one) in zip(jobs, asked):
        if one is None:
            assert not job.seen
            continue
        tokens = prompt + job.generations[0].token_ids[:-1]
        expected = whole(model, tokens, sites, EDITS["steer"][1] if one.steer else None)
        assert job.seen[0].activations.keys() == expected.keys()
        for site, value in job.seen[0].activations.items():
            torch.testing.assert_close(value, expected[site], rtol=1e-4, atol=1e-4)
    assert jobs[0].generations[0].token_ids == jobs[1].generations[0].token_ids


def test_forked_answers_have_captures_of_their_own(model, tokenizer):
    params = DRAWN.model_copy(update={"n": 3})
    jobs, _ = serve(model, tokenizer, [(PROMPT, params, Inspection(capture=[STREAM]))], chunk=16)
    assert len({tuple(answer.token_ids) for answer in jobs[0].generations}) == 3
    for number, answer in enumerate(jobs[0].generations):
        expected = whole(model, PROMPT + answer.token_ids[:-1], [STREAM])[STREAM]
        torch.testing.assert_close(jobs[0].seen[number].activations[STREAM], expected, rtol=1e-4, atol=1e-4)


def test_lens_reads_the_head_at_every_layer(model, tokenizer):
    looking = Inspection(lens={"sites": [0, -1, "layers.0.residual.mid"], "top": 4})
    (job,), _ = serve(model, tokenizer, [(PROMPT, GREEDY, looking)], chunk=16)
    tokens = PROMPT + job.generations[0].token_ids[:-1]
    for site, reading in job.seen[0].lens.items():
        stream = whole(model, tokens, [site])[site]
        with torch.inference_mode():
            expected = model.logits(model.norm(stream)).log_softmax(-1)
        assert reading.ids.shape == (len(tokens), 4)
        torch.testing.assert_close(reading.logprobs, expected.gather(-1, reading.ids), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(reading.logprobs, expected.topk(4).values, rtol=1e-4, atol=1e-4)
    assert job.seen[0].lens.keys() == {"layers.0.residual.post", "layers.1.residual.post", "layers.0.residual.mid"}
    last = job.seen[0].lens["layers.1.residual.post"].ids[len(PROMPT) - 1 :, 0]
    assert last.tolist() == job.generations[0].token_ids  # the last layer's lens is the model's own prediction


def test_neighbours_keep_every_bit(model, tokenizer):
    """Others in the same steps, with and without an edited one among them."""
    others = [(PROMPT[:length], DRAWN, None) for length in (3, 17, 40)]
    edited = (PROMPT, GREEDY, EDITS["steer"][0])
    jobs, _ = serve(model, tokenizer, [others[0], edited, *others[1:]], chunk=24, prefix_sharing=False)
    plain, _ = serve(model, tokenizer, [others[0], (PROMPT, GREEDY, None), *others[1:]], chunk=24, prefix_sharing=False)
    for place in (0, 2, 3):
        assert jobs[place].generations[0].logprobs == plain[place].generations[0].logprobs
    assert jobs[1].generations[0].token_ids != plain[1].generations[0].token_ids


def test_one_sequence_sees_no_other(model, tokenizer):
    """Control for the tests above: a tap that gives a probe its neighbour's rows is noticed."""
    ragged, probes = Ragged([0, 0], [3, 4]), [_probe(model, capture=["embed"]), _probe(model, capture=["embed"])]
    row = torch.arange(7)[None]
    swapped = Ragged([0, 0], [4, 3])
    for layout, right in ((ragged, True), (swapped, False)):
        with watching(model, layout, probes):
            model.site("embed", row[..., None].expand(1, 7, WIDTH).float())
        mine = probes[0].seen(3).activations["embed"][:, 0].tolist()
        assert (len(probes[0]._captured["embed"][-1][1]) == 3) is right
        assert mine == [0, 1, 2]
        probes[0]._captured.clear()
        probes[1]._captured.clear()


def _probe(model, **asked):
    return Probe.of(model, Inspection(**asked), prompt=20, new=4)


def test_nothing_is_installed_where_nobody_looks(model, tokenizer, monkeypatch):
    """The price of not looking is nothing: no tap during any forward pass."""
    monkeypatch.setattr(type(model.sites), "tapped", lambda *_: pytest.fail("a tap for nobody"))
    taps = []
    model.register_forward_pre_hook(
        hook := lambda *_: taps.append([part.tap for part in model.modules() if hasattr(part, "tap")])
    )
    serve(model, tokenizer, [(PROMPT, GREEDY, None), (PROMPT[:5], DRAWN, None)])
    model._forward_pre_hooks.clear()
    assert hook and taps and not any(tap for step in taps for tap in step)


def test_rows_computed_again_replace_what_was_seen(model):
    probe = _probe(model, capture=["embed"])
    for first, rows in ((0, 3), (3, 4), (5, 2), (0, 6)):  # forward, rejected proposals, preemption
        probe.see("embed", torch.full((rows, WIDTH), float(10 * first + rows)), first)
        assert probe.seen(first + rows).activations["embed"].shape == (first + rows, WIDTH)
    assert (probe.seen(6).activations["embed"] == 6).all()
    with pytest.raises(AssertionError):
        probe.seen(7)


def test_key_is_the_edit_and_nothing_else(model):
    def key(prompt=20, **asked):
        return Probe.of(model, Inspection(**asked), prompt, 4).key

    steer = {"site": STREAM, "vector": VECTOR}
    assert key(capture=[STREAM]) == "" == key(lens={"sites": [0]})
    assert key(steer=[steer]) == key(steer=[steer], capture=["embed"]) == key(prompt=30, steer=[steer])
    others = [
        steer | {"scale": 2.0},
        steer | {"start": 1},
        steer | {"site": "layers.1.residual.post"},
        steer | {"vector": [1.0] * WIDTH},
    ]
    assert len({key(steer=[one]) for one in [steer, *others]}) == 5
    answer = {"site": STREAM, "vector": VECTOR, "start": -1}
    assert key(prompt=20, steer=[answer]) != key(prompt=30, steer=[answer])  # another place in the prompt
    assert key(ablate=[{"site": STREAM, "positions": [1]}]) != key(ablate=[{"site": STREAM, "channels": [1]}])


def test_travels_as_json(model):
    whole = EDITS["ablate to a mean"][0].model_copy(update={"capture": ("embed",)})
    again = Inspection.model_validate(json.loads(json.dumps(whole.model_dump(mode="json"))))
    assert again == whole
    encoded = base64.b64encode(np.array(VECTOR, "<f4").tobytes()).decode()
    assert Inspection(steer=[{"site": STREAM, "vector": encoded}]) == Inspection(steer=[{"site": STREAM, "vector": VECTOR}])
    json.dumps(_probe(model, capture=["embed"], lens={"sites": [0]}).seen(0).plain())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "names something to capture"),
        ({"capture": ["layers.0.residual.pots"]}, "did you mean 'layers.0.residual.post'"),
        ({"capture": ["layers.0.mixer.pattern"]}, "has no row for each token in the engine"),
        ({"steer": [{"site": STREAM, "vector": [1.0]}]}, "vector has 1 numbers, and the site 32"),
        ({"steer": [{"site": STREAM, "vector": [float("nan")] * WIDTH}]}, "finite"),
        ({"steer": [{"site": STREAM, "vector": "!"}]}, "base64"),
        ({"steer": [{"site": STREAM, "vector": ["a"]}]}, "must be numbers"),
        ({"steer": [{"site": STREAM, "vector": [3e38] * WIDTH, "scale": 9.0}]}, "larger than float32"),
        ({"steer": [{"site": STREAM, "vector": VECTOR, "start": 99}]}, "lies outside of prompt and answer"),
        ({"steer": [{"site": STREAM, "vectors": VECTOR}]}, "steer.0"),
        ({"patch": [{"site": STREAM, "positions": [0, 1, 2], "values": [1.0] * (2 * WIDTH)}]}, "64 values for 3 rows of 32"),
        ({"patch": [{"site": STREAM, "positions": [-21], "values": [1.0] * WIDTH}]}, "lies outside"),
        ({"ablate": [{"site": STREAM, "heads": [0]}]}, "has no heads"),
        ({"ablate": [{"site": HEAD, "heads": [4]}]}, "heads are 0 to 3"),
        ({"ablate": [{"site": HEAD, "channels": [-1]}]}, "channels are 0 to 7"),
        ({"lens": {"sites": [2]}}, "layer 2 of 2"),
        ({"lens": {"sites": ["layers.0.mixer.out"]}}, "no site of the residual stream"),
        ({"lens": {"sites": [0], "top": 100000}}, "of a vocabulary of"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_at_once(model, asked, message):
    with pytest.raises(UserError, match=message) as refused:
        Probe.of(model, Inspection.of(**asked), prompt=20, new=4)
    assert "\n" not in str(refused.value)


def test_captures_have_a_limit(model, monkeypatch):
    monkeypatch.setattr("headspring.inference.inspection.probe.MOST_BYTES", 1000)
    with pytest.raises(UserError, match="name fewer sites"):
        _probe(model, capture=["embed"])


def test_a_recurrent_layer_can_be_seen_and_steered(tokenizer):
    """Layers without pages read one sequence after the other."""
    layers = (
        Block(mixer=Mamba(state=4), feedforward=SwiGLU(hidden=64)),
        Block(mixer=Attention(heads=4), feedforward=SwiGLU(hidden=64)),
    )
    model = tiny_model(tokenizer.vocab_size, layers=layers).eval()
    site = "layers.0.mixer.x"
    inside = whole(model, PROMPT, [site])[site].shape[-1]
    steering = Inspection(capture=[site, STREAM], steer=[{"site": site, "vector": [0.5] * inside}])
    asked = [(PROMPT, DRAWN, steering), (PROMPT[:9], DRAWN, None), (PROMPT[:11], DRAWN, Inspection(capture=[site, STREAM]))]
    jobs, _ = serve(model, tokenizer, asked, chunk=6)
    for job, (prompt, params, one) in zip(jobs, asked):
        edits = {site: lambda x: x + 0.5} if one is not None and one.steer else {}
        assert job.generations[0].token_ids == naive(model, prompt, params, edits).tokens
        if one is not None:
            expected = whole(model, prompt + job.generations[0].token_ids[:-1], [site, STREAM], edits)
            for name, value in job.seen[0].activations.items():
                torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-3)


def test_language_model_takes_an_inspection(model, tokenizer):
    lm, (inspection, functions) = LanguageModel(model, tokenizer), EDITS["steer"]
    both = Inspection(capture=[STREAM], steer=inspection.steer)
    first, second = lm.generate([PROMPT, PROMPT[:9]], GREEDY, edits=both)
    assert first.token_ids == naive(model, PROMPT, GREEDY, functions).tokens
    for answer, prompt in ((first, PROMPT), (second, PROMPT[:9])):
        expected = whole(model, prompt + answer.token_ids[:-1], [STREAM], functions)[STREAM]
        torch.testing.assert_close(answer.seen.activations[STREAM], expected, rtol=1e-4, atol=1e-4)
    assert lm.generate([PROMPT], GREEDY)[0].seen is None


def test_the_best_of_several_bring_their_own_captures(model, tokenizer):
    for options in ({"best_of": 4, "n": 2}, {"beam_width": 3, "n": 2, "temperature": 0.0}):
        params = DRAWN.model_copy(update={"seed": 3, **options})
        (job,), _ = serve(model, tokenizer, [(PROMPT, params, Inspection(capture=[STREAM]))], chunk=16)
        for answer in job.generations:
            expected = whole(model, PROMPT + answer.token_ids[:-1], [STREAM])[STREAM]
            torch.testing.assert_close(answer.seen.activations[STREAM], expected, rtol=1e-4, atol=1e-4)


def test_an_encoder_decoder_can_be_steered(tokenizer):
    """Rows are those of the decoder; what the encoder reads has none for a token of the answer."""
    value = FAMILIES["encoder_decoder"]()
    sides = {side: getattr(value, side).model_copy(update={"vocab": tokenizer.vocab_size}) for side in ("encoder", "decoder")}
    model = randomise(value.model_copy(update={"vocab": tokenizer.vocab_size, **sides}).build()).eval()
    site, width = "decoder.layers.0.residual.post", model.config.width
    steering = Inspection(capture=[site], steer=[{"site": site, "vector": [1.0] * width}])
    source = [3, 9, 4, 11]
    engine = Engine(model, tokenizer, EngineConfig())
    job = engine.submit((), GREEDY, source=source, edits=steering)
    engine.run()
    tokens = torch.tensor([[model.config.start, *job.generations[0].token_ids[:-1]]])
    with torch.inference_mode(), model.sites.edit({site: lambda x: x + 1.0}), model.sites.capture([site]) as seen:
        logits = model.logits(model(tokens, source=torch.tensor([source])))
    assert logits.argmax(-1)[0].tolist() == job.generations[0].token_ids
    torch.testing.assert_close(job.seen[0].activations[site], seen[site][0], rtol=1e-3, atol=1e-3)
    with pytest.raises(UserError, match="no row for each token"):
        engine.submit((), GREEDY, source=source, edits=Inspection(capture=["encoder.layers.0.residual.post"]))


@pytest.mark.skipif(not kernels.multiplies_natively(torch.empty(0, dtype=torch.bfloat16)), reason="no native products here")
def test_bits_are_those_of_one_pass_under_any_schedule(tokenizer):
    """In bfloat16 by native products: captures, edited answers, neighbours; in chunks, company, few pages, with speculation."""
    block = Block(mixer=Attention(heads=2, kv_heads=1), feedforward=SwiGLU(hidden=96))
    model = tiny_model(tokenizer.vocab_size, width=64, layers=(block, block), context=128).to(torch.bfloat16).eval()
    model.compute_dtype = torch.bfloat16
    vector = torch.linspace(-1, 1, 64)
    steering = Inspection(capture=["layers.1.residual.mid", "final"], steer=[{"site": STREAM, "vector": vector, "start": -3}])
    both = Inspection(capture=["layers.0.mixer.k", "final"])

    def edit(x):
        x = x.clone()
        x[:, start:] = (x[:, start:].float() + vector).to(x.dtype)
        return x

    page = sum(pool.bytes_per_page for pool in model.new_pages(1))
    configs = [{}, {"chunk": 9}, {"chunk": 16, "memory": 3 * page, "context": 64}, {"chunk": 64, "speculation": PromptLookup()}]
    preempted = 0
    for config in configs:
        mine = PROMPT[:28] if "memory" in config else PROMPT  # a page, and another one soon
        start = len(mine) - 3
        asked = [(mine, params, one) for params in (GREEDY, DRAWN) for one in (steering, None, both)]
        jobs, engine = serve(model, tokenizer, asked, **config)
        preempted += engine.stats().preemptions
        for job, (prompt, _, one) in zip(jobs, asked):
            edits = {STREAM: edit} if one is steering else {}
            tokens = prompt + job.generations[0].token_ids
            with torch.inference_mode(), model.sites.edit(edits):
                scores = log_probs(model, model(torch.tensor([tokens[:-1]])), torch.tensor([tokens[1:]]))[0]
            assert scores[len(prompt) - 1 :].tolist() == job.generations[0].logprobs
            if one is not None:
                expected = whole(model, tokens[:-1], list(one.capture), edits)
                assert all(torch.equal(job.seen[0].activations[site], expected[site]) for site in one.capture)
    assert preempted
