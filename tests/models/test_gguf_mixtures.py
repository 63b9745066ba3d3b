"""Mixtures of experts in GGUF files: there and back, as `transformers` reads them, and run as the blocks they are."""

import pytest
import torch

from headspring.artifacts import UserError
from headspring.artifacts.gguf import GgufFile
from headspring.inference.quantization.installing import install, installed
from headspring.models import Attention, Block, Branch, Decoder, MoE, RMSNorm, repeat
from headspring.models.dialects.gguf import export_gguf, import_gguf, read_gguf
from headspring.models.routing import SoftmaxRouter
from tests.models.conftest import randomise
from tests.models.test_gguf import SIX, distance, same


def mixture(attention: dict, norm: RMSNorm, **experts) -> Decoder:
    mixer = Branch(f=Attention(heads=4, kv_heads=2, **{"qk_norm": None} | attention), pre=norm)
    block = Block(mixer=mixer, feedforward=Branch(f=MoE(**{"experts": 4, "top": 2, "hidden": 96} | experts), pre=norm))
    return Decoder(vocab=61, width=64, layers=repeat(2, block), context=96, norm=norm, tied=False)


CASES = {
    "llama": mixture({}, RMSNorm(epsilon=1e-5)),
    "qwen3moe": mixture({"qk_norm": SIX, "head_dim": 128}, SIX),
}
EXPERTS = {f"layers.{layer}.feedforward.f.experts.{name}" for layer in range(2) for name in ("gate", "up", "out")}
TOKENS = torch.randint(1, 61, (2, 30), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=CASES)
def model(request):
    return randomise(CASES[request.param].build(), seed=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_written_is_read_bit_for_bit(model, dtype, tmp_path):
    model.to(dtype)
    name = export_gguf(model, tmp_path / "a.gguf")
    back = import_gguf(tmp_path / "a.gguf")
    assert same(back, model) and back.config.layers == model.config.layers
    assert GgufFile(tmp_path / "a.gguf").metadata[f"{name}.expert_used_count"] == 2
    assert GgufFile(tmp_path / "a.gguf").tensors["blk.1.ffn_down_exps.weight"].shape == (4, 64, 96)


@torch.no_grad()
def test_transformers_reads_the_same_function(tmp_path):
    """Their reader has its own table of names: the oracle for ours. (It has none for Mixtral.)"""
    transformers = pytest.importorskip("transformers")
    # Their reader takes no width of an expert from the file: it must be the default of their class.
    model = randomise(mixture({"qk_norm": SIX, "head_dim": 128}, SIX, hidden=768).build(), seed=5)
    export_gguf(model, tmp_path / "a.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32)
    theirs.model.config.norm_topk_prob = True  # as llama.cpp computes; their reader leaves the default of their class
    for layer in theirs.model.layers:
        layer.mlp.gate.norm_topk_prob = True
    ours = import_gguf(tmp_path / "a.gguf")
    assert distance(ours, TOKENS, theirs(TOKENS).logits) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["q8_0", "q4_0", "q4_1"])
def test_blocks_run_as_they_are(model, dtype, tmp_path):
    export_gguf(model, tmp_path / "a.gguf", dtype)
    floats = import_gguf(tmp_path / "a.gguf")
    kept, matrices = read_gguf(tmp_path / "a.gguf", keep=True)
    assert set(matrices) >= EXPERTS
    for name in EXPERTS:
        parameter = floats.get_parameter(name)
        assert torch.equal(matrices[name].dequantized().view(parameter.shape), parameter)
    install(kept, matrices)
    kept.compute_dtype = torch.float32
    assert set(installed(kept)) == set(matrices)
    found, wanted = kept.logits(kept(TOKENS)), floats.logits(floats(TOKENS))
    near = (found - wanted).norm(dim=-1) < 0.1 * wanted.norm(dim=-1)
    assert near.float().mean() > 0.7  # activations have 8 bits, and a token near a border may go to another expert


@torch.no_grad()
def test_experts_that_are_only_partly_blocks_become_floats(tmp_path, monkeypatch):
    from headspring.models.dialects import gguf

    model = randomise(CASES["llama"].build())
    export_gguf(model, tmp_path / "a.gguf", "q8_0")
    real = gguf.keeps
    monkeypatch.setattr(gguf, "keeps", lambda file, name: real(file, name) and name != "blk.0.ffn_up_exps.weight")
    kept, matrices = read_gguf(tmp_path / "a.gguf", keep=True)
    assert {name for name in EXPERTS if name in matrices} == {name for name in EXPERTS if name.startswith("layers.1.")}
    install(kept, matrices)
    assert kept(TOKENS).isfinite().all()


def test_weights_that_are_not_normalised_have_no_words(tmp_path):
    value = mixture({"qk_norm": SIX}, SIX, router=SoftmaxRouter(renormalise=False))
    with pytest.raises(UserError, match="cannot express"):
        export_gguf(value.build(), tmp_path / "a.gguf")
