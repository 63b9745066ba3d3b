"""`headspring audit MODEL --compare OTHER`, with exit codes, and against `transformers`."""

import json

import pytest
import torch
from typer.testing import CliRunner

from headspring.cli import app
from headspring.inference.audit import audit
from headspring.models import Attention, Block, Causal, Decoder, SwiGLU, repeat, save_model
from headspring.models.dialects import export_huggingface
from tests.models.conftest import randomise, small_decoder
from tests.models.parity import peer
from tests.models.test_dialects_decoders import CASES as DECODERS
from tests.models.test_dialects_llama import CASES as LLAMA
from tests.models.test_dialects_mixtures import CASES as MIXTURES


def run(*arguments):
    return CliRunner().invoke(app, ["audit", *map(str, arguments)])


@pytest.fixture
def folders(tmp_path):
    """The same model, native and as Hugging Face's; and one with another rotary base."""
    model = randomise(small_decoder().build())
    save_model(model, tmp_path / "native")
    export_huggingface(model, tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 5e5
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    (tmp_path / "other" / "model.safetensors").write_bytes((tmp_path / "theirs" / "model.safetensors").read_bytes())
    return tmp_path


def test_equal_models_in_two_formats(folders):
    result = run(folders / "native", "--compare", folders / "theirs")
    assert result.exit_code == 0 and "equal at all" in result.stdout


def test_a_difference_is_named_and_the_exit_code_says_so(folders):
    result = run(folders / "native", "--compare", folders / "other")
    assert result.exit_code == 1
    assert "layers.0.mixer.q differs" in result.stdout and "theta is 500000, and 10000 here" in result.stdout
    found = json.loads(run(folders / "native", "--compare", folders / "other", "--json").stdout)
    assert not found["equal"] and found["place"] == "layers.0.mixer.q" and found["tokens"] == 32


def test_bad_input(folders, tmp_path):
    for arguments in (("--compare", "nowhere"), ("--compare", folders / "theirs", "--reference", "jax"),
                      ("--compare", folders / "native", "--reference", "transformers"),
                      ("--compare", folders / "theirs", "--tokens", "1")):  # fmt: skip
        error = run(folders / "native", *arguments).exception
        assert getattr(error, "exit_code", None) == 2 and "\n" not in str(error), arguments
    save_model(small_decoder(vocab=62).build(), tmp_path / "wide")
    assert "61 and 62 tokens" in str(run(folders / "native", "--compare", tmp_path / "wide").exception)


def test_windows_beyond_the_tokens_are_said(tmp_path):
    block = Block(mixer=Attention(heads=4, mask=Causal(window=40)), feedforward=SwiGLU(hidden=48))
    save_model(randomise(Decoder(vocab=61, width=32, layers=repeat(1, block), context=64).build()), tmp_path)
    assert audit(tmp_path, tmp_path)["windows_not_reached"] == []
    assert audit(tmp_path, tmp_path, length=20)["windows_not_reached"] == [40]


CASES = LLAMA | DECODERS | MIXTURES
SEEN = ["llama-gqa-tied", "phi3", "gpt2", "neox", "opt-post-norm", "bloom", "falcon-40b", "gemma2", "gemma3", "mixtral",
        "gpt-oss", "deepseek-v3"]  # fmt: skip


@pytest.mark.parametrize("name", SEEN)
def test_transformers_as_the_reference(name, tmp_path):
    """Every family is laid beside its reference module by module: at least six matrices and norms of each layer."""
    theirs = peer(*CASES[name], tmp_path)
    found = audit(theirs.folder, theirs.folder, reference="transformers")
    assert found["equal"] and found["equal_places"] >= 2 + 6 * theirs.model.config.num_hidden_layers, found


@pytest.mark.parametrize(
    ("name", "change", "cause"),
    [
        ("llama-mha", {"rms_norm_eps": 1e-3}, "epsilon seems to be 1e-06"),
        ("llama-mha", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "theta seems to be 10000"),
        ("mistral-window", {"sliding_window": 8}, "window seems to be 7"),
        ("gpt2", {"activation_function": "gelu"}, "activation seems to be gelu_tanh"),
        ("gemma2", {"query_pre_attn_scalar": 26}, "scale seems to be 0.27735"),
    ],
)
def test_a_wrong_reading_of_a_folder_is_found_against_transformers(name, change, cause, tmp_path):
    """MODEL's config.json was spoilt; the reference reads the folder as it was."""
    theirs = peer(*CASES[name], tmp_path)
    spoilt = tmp_path / "spoilt"
    spoilt.mkdir()
    config = json.loads((theirs.folder / "config.json").read_text())
    (spoilt / "config.json").write_text(json.dumps(config | change))
    (spoilt / "model.safetensors").write_bytes((theirs.folder / "model.safetensors").read_bytes())
    found = audit(spoilt, theirs.folder, reference="transformers")
    assert not found["equal"] and any(cause in text for text in found["causes"]), found


def test_the_reference_sees_a_transposed_matrix(tmp_path):
    theirs = peer(*CASES["gpt2"], tmp_path)
    ours = tmp_path / "ours"
    from headspring.models.dialects import import_huggingface

    model = import_huggingface(theirs.folder)
    with torch.no_grad():
        weight = model.layers[1].mixer.f.out.weight
        weight.copy_(weight.clone().T)
    export_huggingface(model, ours)
    found = audit(ours, theirs.folder, reference="transformers")
    assert found["place"] == "layers.1.mixer.f.out" and any("out.weight is transposed" in text for text in found["causes"])
