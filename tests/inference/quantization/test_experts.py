"""Experts in whole numbers: near, small, bit for bit from a folder, by GPTQ where they saw text, and floats again."""

import pytest
import torch

import headspring as hs
from headspring.artifacts import UserError
from headspring.inference import LanguageModel
from headspring.inference.conversion import convert
from headspring.inference.quantization.choice import matrices_of
from headspring.inference.quantization.installing import install, installed, restore
from headspring.inference.quantization.quantize import quantize
from headspring.inference.quantization.report import as_text, sizes
from headspring.inference.quantization.scheme import Quantization
from headspring.models import Attention, Block, MoE, kernels, repeat

from ..tiny import TEXT, tiny_decoder

SCHEMES = ("int8", "int8-32", "int4", "int4-gptq")
PARTS = {f"layers.{layer}.feedforward.f.experts.{name}" for layer in range(2) for name in ("gate", "up", "out")}


def mixture(vocab: int, seed: int = 0, hidden: int = 96) -> torch.nn.Module:
    block = Block(mixer=Attention(heads=2, kv_heads=1), feedforward=MoE(experts=4, top=2, hidden=hidden))
    model = tiny_decoder(vocab, width=64, layers=repeat(2, block)).build(3).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.12, generator=generator)
    return model


@pytest.fixture(scope="module")
def source(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture") / "model"
    LanguageModel(mixture(tokenizer.vocab_size), tokenizer).save(folder)
    return folder


@torch.inference_mode()
def logits(lm: LanguageModel) -> torch.Tensor:
    return lm.logits(lm.prompt_ids(TEXT[2])[:60])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_experts_are_whole_numbers_and_come_back_from_a_folder(source, scheme, tmp_path):
    whole, quantized = hs.load(source, device="cpu"), hs.load(source, device="cpu", quantize=scheme)
    assert set(installed(quantized.model)) >= PARTS
    difference = (logits(quantized) - logits(whole)).abs().mean() / logits(whole).abs().mean()
    assert 0 < difference < (0.2 if scheme.startswith("int8") else 0.6)  # a token may go to another expert
    size = sizes(whole.model, quantized.model)
    assert size["bytes"] < (0.35 if scheme.startswith("int8") else 0.25) * size["original_bytes"]
    quantized.save(tmp_path / "a")
    assert torch.equal(logits(hs.load(tmp_path / "a", device="cpu")), logits(quantized))
    assert len(quantized.generate("the quick", max_tokens=4, temperature=0.0)[0].token_ids) == 4


@torch.no_grad()
@pytest.mark.parametrize("hidden", [96, 40])  # 40: outputs do not fill panels
def test_numbers_are_those_that_were_installed_and_floats_can_be_made_of_them(hidden):
    model = mixture(300, hidden=hidden)
    matrices = quantize(model, Quantization(method="int4", group=32, minimum=True))
    install(model, matrices)
    for name, matrix in installed(model).items():
        assert torch.equal(matrix.dequantized(), matrices[name].dequantized()), name
    assert model.get_parameter("layers.0.feedforward.f.experts.gate").isnan().all()
    restore(model)
    for name in PARTS:
        parameter = model.get_parameter(name)
        assert torch.equal(parameter, matrices[name].dequantized().view(parameter.shape))
    install(model, matrices)
    with torch.enable_grad(), pytest.raises(UserError, match="cannot be trained"):
        model.requires_grad_(True)(torch.zeros(1, 4, dtype=torch.int64))


@torch.no_grad()
def test_an_expert_is_multiplied_by_its_own_numbers():
    """Against floats that its whole numbers mean; the control exchanges two experts."""
    tokens = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(1))
    model, floats = mixture(300), mixture(300)
    matrices = quantize(model, Quantization(group=32))
    for name in PARTS:
        parameter = floats.get_parameter(name)
        parameter.copy_(matrices[name].dequantized().view(parameter.shape))
    install(model, {name: matrices[name] for name in PARTS})
    model.compute_dtype = torch.float32
    wanted, found = floats(tokens), model(tokens)
    assert (found - wanted).norm() < 0.05 * wanted.norm()
    for name in PARTS:
        parameter = floats.get_parameter(name)
        parameter.copy_(parameter.roll(1, 0))
    assert (found - floats(tokens)).norm() > 0.3 * wanted.norm()


@torch.no_grad()
def test_gptq_keeps_outputs_better_than_rounding_and_says_where_an_expert_saw_too_little():
    rows = torch.randint(0, 300, (16, 60), generator=torch.Generator().manual_seed(2))
    floats = mixture(300)
    errors = {}
    for method in ("int4", "int4-gptq"):
        model, notes = mixture(300), list[str]()
        install(model, quantize(model, Quantization(method=method), rows if "gptq" in method else None, notes))
        model.compute_dtype = torch.float32
        errors[method] = float((model(rows) - floats(rows)).norm())
        assert notes == []
    assert errors["int4-gptq"] < errors["int4"]
    model, notes = mixture(300), []
    quantize(model, Quantization(method="int4-gptq"), rows[:1, :20], notes)
    assert notes and all("rounded to the nearest for experts" in note for note in notes)
    assert as_text({"notes": notes}) == notes


def test_a_conversion_reports_what_experts_saw(source, tmp_path):
    scheme = Quantization(method="int4-gptq", tokens=16)
    done = convert(source, tmp_path / "small", quantize=scheme)
    assert any("saw fewer than 16 tokens" in note for note in done["quantization"]["notes"])


def test_the_experts_that_a_token_meets_are_tested_and_timed(source):
    lm = hs.load(source, device="cpu", quantize="int8-32")
    assert sum(matrix.shape == (192, 64) for matrix in matrices_of(lm.model)) == 2 * 2  # two of four, in two layers


@pytest.mark.skipif(not kernels.multiplies_natively(torch.zeros(1, dtype=torch.bfloat16)), reason="no native products here")
@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_a_token_has_the_same_bits_in_every_batch(source, scheme):
    lm = hs.load(source, device="cpu", dtype="bfloat16", quantize=scheme)
    tokens = torch.randint(0, 300, (6, 30), generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        together = lm.model(tokens)
        assert all(torch.equal(lm.model(row[None])[0], other) for row, other in zip(tokens, together))
