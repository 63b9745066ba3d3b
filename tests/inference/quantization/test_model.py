"""Whole models in whole numbers: quantized, kept from a GGUF file, saved, loaded again, made floats again, refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import headspring as hs
from headspring.artifacts import CorruptArtifact, UserError
from headspring.inference import LanguageModel
from headspring.inference.conversion import convert
from headspring.inference.quantization.calibration import token_rows
from headspring.inference.quantization.installing import install, installed, restore
from headspring.inference.quantization.quantize import quantize
from headspring.inference.quantization.report import Baseline, report, sizes
from headspring.inference.quantization.scheme import Quantization
from headspring.models.folder import WEIGHTS

from ..tiny import TEXT, tiny_decoder

SCHEMES = ("int8", "int8-32", "int4", "int4-gptq")


@pytest.fixture(scope="module")
def source(tokenizer, tmp_path_factory):
    """Its widths are no multiples of one another, and its sizes those of real groups."""
    from headspring.models import Attention, Block, SwiGLU, repeat

    block = Block(mixer=Attention(heads=4, kv_heads=2), feedforward=SwiGLU(hidden=160))
    model = tiny_decoder(tokenizer.vocab_size, width=64, layers=repeat(3, block)).build(3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.15, generator=generator)
    folder = tmp_path_factory.mktemp("source") / "model"
    LanguageModel(model, tokenizer).save(folder)
    return folder


def load(path, **options) -> LanguageModel:
    return hs.load(path, device="cpu", **options)


@torch.inference_mode()
def logits(lm: LanguageModel) -> torch.Tensor:
    return lm.logits(lm.prompt_ids(TEXT[2])[:60])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantized_model_is_near_and_small_and_answers(source, scheme):
    whole, quantized = load(source), load(source, quantize=scheme)
    difference = (logits(quantized) - logits(whole)).abs().mean() / logits(whole).abs().mean()
    assert 0 < difference < (0.1 if scheme.startswith("int8") else 0.4)
    size = sizes(whole.model, quantized.model)
    assert size["bytes"] < (0.35 if scheme.startswith("int8") else 0.25) * size["original_bytes"]
    assert {name for name in installed(quantized.model) if ".q." in name} == {f"layers.{i}.mixer.f.q.weight" for i in range(3)}
    assert len(quantized.generate("the quick", max_tokens=5, temperature=0.0)[0].token_ids) == 5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_folder_comes_back_bit_for_bit(source, scheme, tmp_path):
    first = load(source, quantize=scheme)
    first.save(tmp_path / "a")
    again = load(tmp_path / "a")
    assert torch.equal(logits(first), logits(again)) and again.model.compute_dtype == torch.bfloat16
    again.save(tmp_path / "b")
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
    with pytest.raises(UserError, match="quantized already"):
        load(tmp_path / "a", quantize="int8")


def test_one_changed_value_in_a_folder_changes_the_logits(source, tmp_path):
    """The control of the test above; the hash must then be told, too."""
    load(source, quantize="int4").save(tmp_path)
    before, tensors = logits(load(tmp_path)), load_file(tmp_path / WEIGHTS)
    tensors["layers.1.mixer.f.out.weight.values"][0] ^= 1
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(CorruptArtifact, match="differs from the hash"):
        load(tmp_path)
    _tell_hash(tmp_path)
    assert not torch.equal(before, logits(load(tmp_path)))


def _tell_hash(folder):
    import hashlib

    config = json.loads((folder / "config.json").read_text())
    config["weights_sha256"] = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("damage", ["missing", "extra", "rows", "groups", "dtype"])
def test_tensors_that_do_not_fit_are_refused(source, damage, tmp_path):
    load(source, quantize="int4").save(tmp_path)
    tensors, name = load_file(tmp_path / WEIGHTS), "layers.0.mixer.f.q.weight"
    if damage == "missing":
        del tensors[f"{name}.scales"]
    elif damage == "extra":
        tensors["other"] = torch.zeros(1)
    elif damage == "rows":
        tensors[f"{name}.values"] = tensors[f"{name}.values"][:-1].contiguous()
    elif damage == "groups":
        tensors[f"{name}.scales"] = tensors[f"{name}.scales"].repeat(1, 16)
    else:
        tensors[f"{name}.scales"] = tensors[f"{name}.scales"].to(torch.int32)
    save_file(tensors, tmp_path / WEIGHTS)
    _tell_hash(tmp_path)
    with pytest.raises(CorruptArtifact):
        load(tmp_path)


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1"])
def test_the_blocks_of_a_file_run_as_they_are(source, dtype, tmp_path):
    """Queries and keys of this architecture change places by rows, and what is kept has the values of what is unpacked."""
    convert(source, tmp_path / "a.gguf", dtype=dtype)
    floats, kept = load(tmp_path / "a.gguf"), load(tmp_path / "a.gguf", quantize="keep")
    matrices = installed(kept.model)
    for name, matrix in matrices.items():
        assert torch.equal(matrix.dequantized(), floats.model.get_parameter(name))
    assert len(matrices) == 1 + 3 * 7
    assert (logits(floats) - logits(kept)).abs().mean() < 0.05 * logits(floats).abs().mean()
    kept.save(tmp_path / "folder")
    assert torch.equal(logits(load(tmp_path / "folder")), logits(kept))


def test_what_is_kept_can_be_floats_again(source, tmp_path):
    convert(source, tmp_path / "a.gguf", dtype="q4_0")
    floats, kept = load(tmp_path / "a.gguf"), load(tmp_path / "a.gguf", quantize="keep")
    restore(kept.model)
    assert torch.equal(logits(kept), logits(floats)) and not installed(kept.model)
    assert kept.model.get_parameter("layers.0.mixer.f.q.weight").requires_grad


def test_a_quantized_folder_converts_to_every_format(source, tmp_path):
    convert(source, tmp_path / "small", quantize="int8")
    whole = load(tmp_path / "small")
    restore(whole.model)
    for target in (tmp_path / "theirs", tmp_path / "b.gguf"):
        convert(tmp_path / "small", target)
        assert torch.equal(logits(load(target)), logits(whole))


def test_a_quantized_model_refuses_training_and_other_devices(source, tmp_path):
    quantized = load(source, quantize="int8")
    assert not any(parameter.requires_grad for parameter in quantized.model.parameters())
    quantized.model.requires_grad_(True)
    with pytest.raises(UserError, match="cannot be trained"):
        quantized.logits([1, 2, 3])


@pytest.mark.parametrize(
    ("how", "why"),
    [("int3", "'int3' is unknown; use int8"), ("int4-gptq-48", "is unknown"), ("keep", "for the blocks of a .gguf file")],
)
def test_what_means_nothing_is_refused(source, how, why):
    with pytest.raises(UserError, match=why) as error:
        load(source, quantize=how)
    assert "\n" not in str(error.value)


def test_plain_numbers_in_a_file_are_no_blocks(source, tmp_path):
    convert(source, tmp_path / "a.gguf", dtype="bf16")
    with pytest.raises(UserError, match="holds no blocks to keep"):
        load(tmp_path / "a.gguf", quantize="keep")
    assert not installed(load(tmp_path / "a.gguf", quantize="auto").model)


def test_weights_that_are_not_finite_are_named(lm):
    model = lm.config.build(0)
    model.get_parameter("layers.0.mixer.f.q.weight").data[0, 0] = torch.inf
    with pytest.raises(UserError, match=r"layers.0.mixer.f.q.weight holds numbers that are not finite"):
        quantize(model, Quantization())


def test_gptq_calibrates_on_the_text_it_is_given(source, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(TEXT * 20))
    rows = token_rows(load(source).tokenizer, iter(TEXT * 20), 512, 96)
    hurts = {}
    for name in ("int4", "int4-gptq"):
        text = {"calibration": str(tmp_path / "text.txt"), "tokens": 2048} if name == "int4-gptq" else {}
        scheme = Quantization(method=name, **text)
        original, quantized = load(source), load(source, quantize=scheme)
        hurts[name] = report(Baseline(original.model, original.tokenizer, rows, torch.bfloat16), quantized.model, name)
    assert hurts["int4-gptq"].kl < 0.7 * hurts["int4"].kl
    with pytest.raises(UserError, match="cannot be read as text"):
        load(source, quantize=Quantization(method="int4-gptq", calibration=str(tmp_path / "none.txt")))


def test_a_report_finds_the_layer_that_hurts(source):
    original, quantized = load(source), load(source, quantize="int8-32")
    matrices = installed(quantized.model)
    damaged = load(source)
    name = "layers.1.feedforward.f.out.weight"
    matrices[name].values.copy_(matrices[name].values.roll(1, 0))
    install(damaged.model, matrices)
    damaged.model.compute_dtype = torch.bfloat16
    rows = token_rows(original.tokenizer, iter(TEXT), 200, 50)
    baseline = Baseline(original.model, original.tokenizer, rows, torch.bfloat16)
    good, bad = (report(baseline, lm.model, "x") for lm in (quantized, damaged))
    assert bad.kl > 10 * good.kl and bad.layers[1].kl > 10 * max(bad.layers[0].kl, bad.layers[2].kl)
    assert bad.layers[1].error > 0.2 > 0.1 > max(layer.error for layer in good.layers)
    assert good.tokens == rows[:, 1:].numel() and 8 < good.bits < 9


def test_a_report_of_nothing_changed_is_zero(source):
    original = load(source)
    rows = token_rows(original.tokenizer, iter(TEXT), 100, 50)
    found = report(Baseline(original.model, original.tokenizer, rows, torch.float32), original.model, "none")
    assert abs(found.kl) < 1e-6 and found.same_best == 1.0 and found.bits == 32.0
    assert found.bits_per_byte == found.original_bits_per_byte > 1.0
    assert all(layer.error == 0.0 and abs(layer.kl) < 1e-6 for layer in found.layers) and len(found.layers) == 3


def test_the_command_reports_and_writes(source, tmp_path, capsys):
    from headspring.cli.convert import convert as command

    command(str(source), tmp_path / "small", quantize="int4", held_out=100)
    said = capsys.readouterr().out
    assert "bits a weight" in said and "the layers that hurt most" in said
    command(str(source), tmp_path / "again", quantize="int8", held_out=0, as_json=True)
    assert json.loads(capsys.readouterr().out)["quantization"] == {"scheme": "int8"}
    assert json.loads((tmp_path / "small" / "config.json").read_text())["quantization"]["kl"] > 0
    for options, why in (({"dtype": "bf16"}, "leave --dtype out"), ({"to": "gguf"}, "GGUF is a file")):
        with pytest.raises(UserError, match=why):
            command(str(source), tmp_path / "other", quantize="int8", **options)
    with pytest.raises(UserError, match="--calibration is the text that int4-gptq reads"):
        command(str(source), tmp_path / "other", quantize="int8", calibration=tmp_path / "a.txt")


@pytest.mark.parametrize("damage", ["kind", "huge", "dtype", "list"])
def test_a_config_that_is_none_is_refused(source, damage, tmp_path):
    load(source, quantize="int8").save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    if damage == "kind":
        config["model"]["kind"] = "none"
    elif damage == "huge":
        config["model"]["width"] = 1 << 50
    elif damage == "dtype":
        config["dtype"] = ["float32"]
    else:
        config["model"] = []
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((CorruptArtifact, UserError)):
        load(tmp_path)
