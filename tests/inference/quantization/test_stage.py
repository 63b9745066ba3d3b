"""The stage `quantize`: a folder of whole numbers from a model of the run, measured on the run's own text."""

import json

import pytest

import headspring as hs
from headspring.artifacts import UserError
from headspring.data.prepare import DataConfig, prepare
from headspring.inference import LanguageModel
from headspring.inference.quantization.folder import is_quantized
from headspring.inference.quantization.stage import QuantizeConfig, quantize_model

from .test_experts import mixture


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    source = {"kind": "stdlib", "max_documents": 60}
    prepare(DataConfig(sources={"code": source}, split={"validation": 0.1, "test": 0.2}), folder)
    return folder


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    LanguageModel(mixture(tokenizer.vocab_size), tokenizer).save(folder)
    return folder


@pytest.mark.parametrize("method", ["int8", "int4-gptq"])
def test_it_writes_a_model_and_says_what_it_cost(data, model, tmp_path, method):
    calibration = {"calibration": 600} if method == "int4-gptq" else {}
    done = quantize_model(QuantizeConfig(method=method, held_out=300, **calibration), model, data, tmp_path, 0)
    assert done["bytes"] < done["original_bytes"] / 2.5 and done["held_out_tokens"] > 200
    assert done["kl"] > 0 and abs(done["bits_per_byte"] - done["original_bits_per_byte"]) < 1
    assert is_quantized(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization"]["bits_per_byte"] == done["bits_per_byte"]
    lm = hs.load(tmp_path, device="cpu")
    assert lm.generate("def ", max_tokens=3, temperature=0.0)[0].token_ids
    with pytest.raises(UserError, match="quantized already"):
        quantize_model(QuantizeConfig(), tmp_path, data, tmp_path / "again", 0)


def test_it_calibrates_on_training_text_and_measures_on_test_text(data, model, tmp_path, monkeypatch):
    from headspring.inference.quantization import stage

    asked, real = [], stage.read_documents
    monkeypatch.setattr(stage, "read_documents", lambda folder, split: asked.append(split) or real(folder, split=split))
    quantize_model(QuantizeConfig(method="int4-gptq", held_out=100, calibration=100), model, data, tmp_path, 0)
    assert asked == ["train", "test"]


def test_the_same_bytes_come_twice(data, model, tmp_path):
    for name in ("a", "b"):
        quantize_model(QuantizeConfig(method="int4-gptq", held_out=100, calibration=200), model, data, tmp_path / name, 0)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"method": "int8", "minimum": True}, "minimum is for 4 bits"),
        ({"method": "int4", "calibration": 500}, "int4 rounds without any text"),
        ({"method": "int3"}, "int4-gptq"),
        ({"method": "int4", "group": 48}, "128"),
        ({"metod": "int4"}, "metod"),
    ],
)
def test_unfit_keys_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        QuantizeConfig(**keys)


def test_an_encoder_is_refused(data, tokenizer, tmp_path):
    from headspring.models import save_model
    from headspring.models.families import FAMILIES

    value = FAMILIES["bert"]() if "bert" in FAMILIES else next(v() for v in FAMILIES.values() if not v().causal)
    save_model(value.model_copy(update={"vocab": tokenizer.vocab_size}).build(0), tmp_path)
    tokenizer.save(tmp_path)
    with pytest.raises(UserError, match="need a model of next tokens"):
        quantize_model(QuantizeConfig(), tmp_path, data, tmp_path / "out", 0)
