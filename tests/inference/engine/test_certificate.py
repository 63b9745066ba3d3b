"""The certificate proves what holds and says what does not; random schedules change no bit."""

import random

import pytest
import torch

from headspring.artifacts import UserError
from headspring.inference import LanguageModel
from headspring.inference.engine import certificate as certificates
from headspring.inference.engine.certificate import Check, certify, weights_digest
from headspring.inference.engine.schedules import Schedule, play, requests
from headspring.models import Attention, Block, Causal, MoE, SwiGLU, kernels, scoring
from headspring.models.kernels import packing
from headspring.models.routing import SoftmaxRouter
from tests.inference.tiny import tiny_model

SIZES = {"width": 64, "context": 192}


def small(tokenizer, dtype=torch.bfloat16, window=None) -> LanguageModel:
    """Matrices that the native products take; scores as decided as in a trained model."""
    blocks = [
        Block(mixer=Attention(heads=2, kv_heads=1, mask=Causal(window=one)), feedforward=SwiGLU(hidden=96))
        for one in (window, None)
    ]
    model = tiny_model(tokenizer.vocab_size + 20, layers=tuple(blocks), **SIZES).to(dtype)
    model.compute_dtype = dtype
    return LanguageModel(model, tokenizer)


@pytest.fixture
def lm(tokenizer, tmp_path, monkeypatch) -> LanguageModel:
    kernels.numerics_id()  # built in the usual cache, before that is moved
    monkeypatch.setattr(certificates.native, "cache_folder", lambda: tmp_path)
    return small(tokenizer)


def bitwise() -> bool:
    """Whether this machine, with these kernels, promises equal bits."""
    return kernels.multiplies_natively(torch.zeros(1, 32, dtype=torch.bfloat16))


def failed(certificate) -> set[str]:
    return {check.name for check in certificate.checks if not check.equal}


def test_it_holds(lm):
    certificate = certify(lm)
    if bitwise():
        assert certificate.holds, certificate.text()
        assert "holds" in certificate.text().splitlines()[0]
        assert [other.name for other in certificate.others] == ["plain kernels (HEADSPRING_KERNELS=plain)"]
        assert certificate.others[0].kl > 0  # it does measure
    assert all(check.compared for check in certificate.checks)
    assert not [check.name for check in certificate.checks if check.note], "a schedule did not bring about what it is named for"


def test_it_holds_for_quantized_weights(lm):
    packing.pack_model(lm.model, "int8")
    certificate = certify(lm)
    if bitwise():
        assert certificate.holds, certificate.text()
    assert certificate.precision == "bfloat16 with int8 weights"
    assert {check.note for check in certificate.checks if not check.compared} == {"quantized weights are not trained"}


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_it_holds_for_mixtures_of_experts(tokenizer, lm, kind):
    """An expert's rows come and go with the batch; a row's bits do not."""
    experts = MoE(experts=5, top=2, hidden=96, router=SoftmaxRouter(bias=True), shared=64, shared_gate=True, bias=True)
    blocks = (Block(mixer=Attention(heads=2, kv_heads=1), feedforward=experts),) * 2
    model = tiny_model(tokenizer.vocab_size + 20, layers=blocks, **SIZES).to(torch.bfloat16)
    model.compute_dtype = torch.bfloat16
    packing.pack_model(model, kind)
    certificate = certify(LanguageModel(model, tokenizer))
    assert ("int8" in certificate.precision) == (kind == "int8")
    if bitwise():
        assert certificate.holds, certificate.text()


def test_float32_says_how_far_it_is(lm):
    """Products of float32 are a library's, whose sums depend on the batch: the certificate says what is."""
    lm.model.float().compute_dtype = torch.float32
    certificate = certify(lm)
    assert certificate.holds == (not failed(certificate))
    for check in certificate.checks:
        assert check.largest < 1e-4 and check.kl < 1e-8 and check.other_tokens == 0
        assert ("equal" in check.text()) == check.equal


def test_it_is_kept_until_something_changes(lm, monkeypatch):
    first = certify(lm)
    monkeypatch.setattr(certificates, "_Proof", lambda *_: pytest.fail("proved again"))
    assert certify(lm) == first
    with pytest.raises(pytest.fail.Exception), torch.no_grad():
        next(lm.model.parameters())[0, 0] += 1
        certify(lm)


def test_digest_sees_every_weight(lm):
    before, seen = weights_digest(lm.model), set()
    for parameter in lm.model.parameters():
        with torch.no_grad():
            kept = parameter.flatten()[0].clone()
            parameter.flatten()[0] += 1
            seen.add(weights_digest(lm.model))
            parameter.flatten()[0] = kept
    assert len(seen | {before}) == len(list(lm.model.parameters())) + 1
    assert weights_digest(lm.model) == before
    packing.pack_model(lm.model, "bf16")
    assert weights_digest(lm.model) == before  # a copy of the parameters
    packing.unpack_model(lm.model)
    packing.pack_model(lm.model, "int8")
    assert weights_digest(lm.model) != before


# ---- planted bugs: each is found, and by the checks that are about it


def test_a_product_that_depends_on_the_batch_is_found(lm, monkeypatch):
    real = kernels.multiply

    def multiply(x, *rest):
        y = real(x, *rest)
        return y * (1 + 2**-7) if x.numel() // x.shape[-1] > 20 else y

    monkeypatch.setattr(kernels, "multiply", multiply)
    monkeypatch.setattr(scoring.kernels, "multiply", multiply)
    certificate = certify(lm)
    assert not certificate.holds
    assert "does not hold" in certificate.text().splitlines()[0]


def test_prefixes_that_are_mistaken_are_found(lm, monkeypatch):
    from headspring.inference.engine.cache import Cache

    real = Cache._known
    monkeypatch.setattr(Cache, "_known", lambda self, sequence: real(self, sequence) or list(self.index.values())[:1])
    assert failed(certify(lm)) >= {"engine, prefix hits"}
    assert "engine, company" not in failed(certify(lm))


def test_a_wrong_position_after_preemption_is_found(lm, monkeypatch):
    from headspring.inference.engine.scheduler import Scheduler

    def preempt(self, sequence):
        real(self, sequence)
        sequence.tokens[0] = (sequence.tokens[0] + 1) % 100

    real = Scheduler.preempt
    monkeypatch.setattr(Scheduler, "preempt", preempt)
    assert "engine, preemption" in failed(certify(lm))
    assert "engine, alone" not in failed(certify(lm))


def test_encoders_have_none(tokenizer):
    from headspring.models import Encoder

    block = Block(mixer=Attention(heads=2, mask={"kind": "full"}), feedforward=SwiGLU(hidden=32))
    encoder = LanguageModel(Encoder(vocab=tokenizer.vocab_size, width=32, layers=(block,)).build(), tokenizer)
    with pytest.raises(UserError):
        certify(encoder)


def test_what_a_check_says():
    assert Check(name="a", compared=3).text() == "✓  a: equal, 3 log-probabilities"
    wrong = Check(name="a", compared=3, largest=0.5, kl=0.01, other_tokens=2)
    assert wrong.text() == "✗  a: differs by up to 5.0e-01 nats, KL 1.0e-02, 2 answers have other tokens"


# ---- the property: thousands of random schedules, and not one bit


def through(lm: LanguageModel, seeds) -> dict[str, int]:
    """Random requests through random schedules against the same requests alone; what happened on the way, counted."""
    asked = requests(lm, seed=7, count=40, prompt=90, new=5)
    expected = [job.generations for job in play(lm, asked, Schedule())[0]]
    happened: dict[str, int] = dict.fromkeys(("prefix_hits", "preemptions", "cancelled", "tokens"), 0)
    for seed in seeds:
        schedule, chosen = Schedule.random(seed, threads=1), random.Random(seed).sample(range(len(asked)), 3)
        jobs, stats = play(lm, [asked[number] for number in chosen], schedule, debug=seed % 10 == 0)
        for number, job in zip(chosen, jobs):
            assert job.outcome == "finished", (schedule, job.error)
            for got, known in zip(job.generations, expected[number], strict=True):
                assert got.token_ids == known.token_ids, schedule
                assert got.logprobs == known.logprobs, schedule
        for name in happened:
            happened[name] += getattr(stats, name)
    return happened


@pytest.mark.skipif(not bitwise(), reason="no native products here")
def test_alone_is_what_a_trainer_scores(tokenizer):
    """The reference of the property below, against scoring."""
    lm = small(tokenizer)
    for job in play(lm, requests(lm, seed=7, count=12, prompt=90, new=6), Schedule())[0]:
        for answer in job.generations:
            scores = lm.logprobs([answer.prompt_token_ids + answer.token_ids])[0][-len(answer.token_ids) :]
            assert torch.equal(scores, torch.tensor(answer.logprobs))


@pytest.mark.skipif(not bitwise(), reason="no native products here")
@pytest.mark.parametrize(("window", "kind"), [(None, "bf16"), (40, "int8")])
def test_no_schedule_changes_a_bit(tokenizer, window, kind):
    lm = small(tokenizer, window=window)
    packing.pack_model(lm.model, kind)
    happened = through(lm, range(100))
    assert all(happened.values()), happened


@pytest.mark.skipif(not bitwise(), reason="no native products here")
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(10))
def test_ten_thousand_schedules_change_no_bit(tokenizer, part):
    lm = small(tokenizer, window=(None, 40)[part % 2])
    packing.pack_model(lm.model, ("bf16", "int8")[part // 2 % 2])
    through(lm, range(1000 * (part + 1), 1000 * (part + 2)))


def test_equal_checks_prove_nothing_where_products_are_a_librarys():
    """On a GPU: what was compared may be equal by luck."""
    numerics, why = certificates.numerics_of(torch.device("meta"))
    assert numerics == "meta, library products, gathered pages"
    same = {"numerics": numerics, "precision": "bfloat16", "weights": "0" * 64, "machine": {"processor": "some GPU"}}
    same |= {"revision": 2, "quick": True, "seconds": 1.0, "checks": (Check(name="company", compared=5),), "others": ()}
    on_gpu = certificates.Certificate(**same, unproved=why)
    assert not on_gpu.holds and certificates.Certificate(**same).holds
    assert on_gpu.text().startswith("one forward, bit for bit: does not hold: products are a library's")
