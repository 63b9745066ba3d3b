"""Sampling against an obvious reference, against transformers, and against the distribution it must follow."""

import math

import pytest
import torch

from headspring.artifacts import UserError
from headspring.inference.adjusting import adjust
from headspring.inference.generation import Request
from headspring.inference.one_row import draw_one, threshold_of
from headspring.inference.sampling import RowParams, SamplingParams, draw, filtered, pick

from .reference import penalize, sample

VOCAB = 600


def make_logits(rows: int, seed: int = 0, scale: float = 3.0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def rows_of(params: list[SamplingParams], vocab: int = VOCAB) -> RowParams:
    return RowParams.of(params, vocab)


def slow_probabilities(logits: torch.Tensor, params: SamplingParams, seen: set[int]) -> list[float]:
    """One row, in Python floats, one token after the other."""
    values = [float(value) for value in logits]
    for token in seen:
        penalty = params.repetition_penalty
        values[token] = values[token] / penalty if values[token] > 0 else values[token] * penalty
    values = [value / params.temperature for value in values]

    def normalised(kept: dict[int, float]) -> dict[int, float]:
        top = max(kept.values())
        total = sum(math.exp(value - top) for value in kept.values())
        return {token: math.exp(value - top) / total for token, value in kept.items()}

    kept = dict(enumerate(values))
    order = sorted(kept, key=lambda token: -kept[token])
    if params.top_k is not None:
        kept = {token: kept[token] for token in order[: params.top_k]}
    if params.top_p < 1:
        mass, nucleus = 0.0, {}
        probabilities = normalised(kept)
        for token in sorted(kept, key=lambda token: -kept[token]):
            if mass >= params.top_p:
                break
            mass += probabilities[token]
            nucleus[token] = kept[token]
        kept = nucleus
    probabilities = normalised(kept)
    best = max(probabilities.values())
    kept = {token: kept[token] for token in kept if probabilities[token] >= params.min_p * best}
    probabilities = normalised(kept)
    return [probabilities.get(token, 0.0) for token in range(len(values))]


GRID = [
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": VOCAB + 5},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"top_p": 0.999, "temperature": 9.0},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"repetition_penalty": 1.7},
    {"temperature": 1.3, "top_k": 50, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("options", GRID, ids=str)
def test_alone_is_the_reference(options):
    params, logits, seen = SamplingParams(**options), make_logits(1), {3, 5, 77}
    mask = torch.zeros(1, VOCAB, dtype=torch.bool)
    mask[0, list(seen)] = True
    rows = rows_of([params])
    adjusted = penalize(logits, mask, params.repetition_penalty) / rows.temperature
    found = filtered(adjusted, rows).softmax(-1)[0]
    torch.testing.assert_close(found, torch.tensor(slow_probabilities(logits[0], params, seen)), atol=1e-6, rtol=1e-4)


def test_each_row_has_its_own_settings():
    params = [SamplingParams(**options) for options in GRID] + [SamplingParams()]
    logits = make_logits(len(params), seed=1)
    together = rows_of(params)
    adjusted = logits / together.temperature
    found = filtered(adjusted, together)
    for row, one in enumerate(params):
        alone = rows_of([one])
        assert torch.equal(found[row], filtered(logits[row : row + 1] / alone.temperature, alone)[0])


def test_ties_with_the_last_token_stay():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]])
    kept = torch.isfinite(filtered(logits, rows_of([SamplingParams(top_k=2)], 5)))
    assert kept.tolist() == [[False, True, True, True, False]]


def test_same_as_transformers():
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits, history = make_logits(4, seed=3), torch.randint(VOCAB, (4, 30), generator=torch.Generator().manual_seed(4))
    theirs = processors.RepetitionPenaltyLogitsProcessor(1.3)(history, logits.clone())
    for warper in (
        processors.TemperatureLogitsWarper(0.8),
        processors.TopKLogitsWarper(60),
        processors.TopPLogitsWarper(0.9),
        processors.MinPLogitsWarper(0.01),
    ):
        theirs = warper(history, theirs)
    params = SamplingParams(repetition_penalty=1.3, temperature=0.8, top_k=60, top_p=0.9, min_p=0.01)
    rows = rows_of([params] * 4)
    seen = torch.zeros(4, VOCAB, dtype=torch.bool).scatter_(1, history, True)
    ours = filtered(penalize(logits, seen, 1.3) / rows.temperature, rows)
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1), atol=1e-6, rtol=1e-5)
    assert torch.equal(ours == -torch.inf, theirs == -torch.inf)


class Named:
    """As much of a tokenizer as a request needs that asks for no text."""

    vocab_size = VOCAB

    def stream(self):
        return None


def test_bias_and_early_stops_are_those_of_transformers():
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits, prompt, written, stops = make_logits(1, seed=3), [3, 4, 5], [9, 9], [7, 8]
    ids = torch.tensor([prompt + written])
    theirs = processors.SequenceBiasLogitsProcessor({(11,): 2.5, (12,): -4.0})(ids, logits.clone())
    theirs = processors.MinNewTokensLengthLogitsProcessor(len(prompt), 3, stops)(ids, theirs)
    params = SamplingParams(logit_bias={11: 2.5, 12: -4.0}, min_tokens=3)
    request = Request(Named(), prompt, params, context=20, end_ids=stops)
    for token in written:
        request.accept(token, 0.0)
    ours = logits.clone()
    adjust(ours, request, ())
    assert torch.equal(ours, theirs)
    request.accept(9, 0.0)  # three tokens are enough
    ours = logits.clone()
    adjust(ours, request, ())
    assert torch.isfinite(ours[0, stops]).all()


def test_penalties_of_presence_and_frequency_look_at_the_answer_alone():
    """OpenAI's formula: logit − count · frequency_penalty − [count > 0] · presence_penalty."""
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=1.25)
    request, logits = Request(Named(), [3, 4], params, context=20), make_logits(1, seed=4).abs() + 1
    for token in (5, 5, 3):
        request.accept(token, 0.0)
    ours = logits.clone()
    adjust(ours, request, ())
    expected = logits[0].clone()
    expected[[3, 4, 5]] /= 1.25
    expected[5] -= 2 * 0.25 + 0.5
    expected[3] -= 0.25 + 0.5
    torch.testing.assert_close(ours[0], expected)


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Pearson's statistic in units of standard deviations above its mean; tokens expected under 5 times are pooled."""
    rare = expected < 5
    if rare.any():
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    statistic = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum().item()
    degrees = len(counts) - 1
    return (statistic - degrees) / math.sqrt(2 * degrees)


def test_draws_follow_the_distribution():
    draws, vocab = 40_000, 50
    logits = make_logits(1, seed=5, scale=1.0, vocab=vocab)
    params = SamplingParams(temperature=0.9, top_k=30, top_p=0.95)
    rows = rows_of([params], vocab)
    uniforms = torch.rand(draws, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    expected = torch.tensor(slow_probabilities(logits[0], params, set())) * draws
    ids = draw(filtered(logits / rows.temperature, rows).expand(draws, -1), uniforms)
    counts = torch.bincount(ids, minlength=vocab).float()
    assert counts[expected == 0].sum() == 0
    assert abs(chi_square(counts, expected)) < 5
    # The control: another temperature is told apart.
    wrong = torch.tensor(slow_probabilities(logits[0], params.model_copy(update={"temperature": 1.0}), set())) * draws
    assert chi_square(counts, wrong) > 5


def test_the_ends_of_the_unit_interval_are_possible_tokens():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(3, -1)
    uniforms = torch.tensor([0.0, 1 - 2**-53, 1.0], dtype=torch.float64)
    assert draw(logits, uniforms).tolist() == [1, 2, 2]


def test_greedy_rows_beside_drawn_ones():
    logits, rows = make_logits(2, seed=7), rows_of([SamplingParams(temperature=0), SamplingParams()])
    ids = pick(logits, rows, torch.tensor([0.9, 0.0], dtype=torch.float64))
    assert ids.tolist() == [logits[0].argmax().item(), 0]


@pytest.mark.parametrize("scale", [0.05, 3.0, 30.0])
@pytest.mark.parametrize("options", [*GRID, {"top_p": 0.99, "top_k": 3000}, {"temperature": 5.0, "min_p": 0.5}], ids=str)
def test_row_by_row_is_the_definition(options, scale):
    """What runs on a CPU keeps the tokens that the filters keep, and draws the ones that `draw` draws. Wide enough that the
    first few thousand tokens do not always hold the mass of the nucleus."""
    vocab = 12_000
    params, logits = SamplingParams(**options), make_logits(1, seed=11, scale=scale, vocab=vocab)
    logits[0, 100:200] = logits[0, 50]  # ties
    logits[0, 300:400] = -torch.inf
    rows = rows_of([params], vocab)
    scaled = (logits - logits.amax()) / rows.temperature
    expected = filtered(scaled, rows)
    kept = scaled[0].numpy() >= threshold_of(scaled[0].numpy(), params)
    possible = torch.isfinite(scaled[0])
    differs = (torch.from_numpy(kept) & possible) != torch.isfinite(expected[0])
    assert differs.sum() <= 1  # sums of 12,000 float32 numbers, in two libraries: the last token inside may be another one
    uniforms = torch.rand(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ids = [draw_one(logits[0].numpy(), params, uniform) for uniform in [*uniforms.tolist(), 0.0, 1 - 2**-53]]
    uniforms = torch.cat([uniforms, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)])
    same = draw(expected.expand(len(ids), -1), uniforms).tolist()
    # float32 exponentials differ in their last bit between the libraries: a number beside an edge may fall on either side
    assert sum(a != b for a, b in zip(ids, same)) <= 1


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-60])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = make_logits(3, seed=10, scale=30.0)
    uniforms = torch.tensor([0.0, 0.5, 0.999], dtype=torch.float64)
    ids, _ = sample(logits, SamplingParams(temperature=temperature, top_p=0.9), uniforms)
    assert torch.equal(ids, logits.argmax(-1))


def test_log_probs_are_the_models_own():
    logits, params = make_logits(1, seed=8), SamplingParams(temperature=0.3, top_k=3, repetition_penalty=2.0)
    seen = torch.ones(1, VOCAB, dtype=torch.bool)
    ids, log_probs = sample(logits, params, torch.tensor([0.5], dtype=torch.float64), seen)
    torch.testing.assert_close(log_probs, logits.log_softmax(-1)[0, ids])


def test_banned_tokens_do_not_come():
    logits = make_logits(1, seed=9)
    banned = torch.zeros_like(logits, dtype=torch.bool)
    banned[0, logits.argmax()] = True
    ids, _ = sample(logits, SamplingParams(temperature=0), torch.zeros(1), banned=banned)
    assert ids.item() == logits.topk(2).indices[0, 1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"min_p": -0.1}, "min_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"stop": ["a", ""]}, "empty"),
        ({"seed": -3}, "seed"),
        ({"max_token": 3}, "did you mean max_tokens"),
        ({"zzz": 3}, "unknown sampling option zzz"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {3: float("inf")}}, "logit_bias"),
        ({"logprobs": -2}, "logprobs"),
        ({"prompt_logprobs": "most"}, "prompt_logprobs"),
        ({"n": 3, "best_of": 2}, "n=3 answers"),
        ({"best_of": 3, "temperature": 0}, "leave best_of out"),
        ({"n": 3, "beam_width": 2}, "n=3 answers"),
        ({"beam_width": 2, "temperature": 0.7}, "leave temperature out"),
        ({"beam_width": 2, "top_k": 5}, "leave top_k"),
        ({"beam_width": 2, "best_of": 2}, "leave best_of out"),
        ({"beam_width": 2, "seed": 2}, "leave seed out"),
        ({"beam_width": 2, "stop": "a"}, "stop_token_ids"),
        ({"length_penalty": 0.5}, "give beam_width"),
        ({"early_stopping": True}, "give beam_width"),
    ],
    ids=str,
)
def test_impossible_options_are_refused_in_one_line(options, says):
    with pytest.raises(UserError) as caught:
        SamplingParams.of(**options)
    assert says in str(caught.value) and "\n" not in str(caught.value)
