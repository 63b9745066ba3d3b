"""LoRA: the definition (merged float32 weights), PEFT's own numbers and files, and what is refused."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from headspring.artifacts import UserError
from headspring.models.adapter_folder import CONFIG, WEIGHTS, load_adapter, save_adapter
from headspring.models.dialects import import_huggingface
from headspring.models.lora import Adapter, LoRA, LowRank, Rows, Stacked, adaptable, attached, merge, width
from headspring.models.part import Linear
from tests.inference.tiny import tiny_model
from tests.models.adapters import random_adapter
from tests.models.parity import VOCAB, close, peer

LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 96}  # fmt: skip
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
GATED = ["gate_proj", "up_proj", "down_proj"]
CASES = {  # class, settings, targets, options of peft
    "llama": ("Llama", LLAMA, ATTENTION + GATED, {"r": 4, "lora_alpha": 8}),
    "llama-rslora": ("Llama", LLAMA, ["q_proj", "v_proj"], {"r": 8, "lora_alpha": 4, "use_rslora": True}),
    "llama-patterns": ("Llama", LLAMA, ATTENTION, {
        "r": 4, "lora_alpha": 8, "rank_pattern": {"model.layers.1.self_attn.q_proj": 6, "v_proj": 3},
        "alpha_pattern": {"k_proj": 32},
    }),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96}, ["c_attn", "c_proj", "c_fc"],
             {"r": 4, "lora_alpha": 8, "fan_in_fan_out": True}),
    "qwen2": ("Qwen2", LLAMA, ATTENTION + GATED, {"r": 8, "lora_alpha": 16}),
    "phi3": ("Phi3", LLAMA, ["qkv_proj", "gate_up_proj", "o_proj"], {"r": 4, "lora_alpha": 8}),
    "gpt-neox": ("GPTNeoX", {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                             "max_position_embeddings": 96}, ["query_key_value", "dense_h_to_4h"], {"r": 4, "lora_alpha": 8}),
    "mixtral": ("Mixtral", LLAMA | {"num_local_experts": 4}, ATTENTION, {"r": 8, "lora_alpha": 8}),
}  # fmt: skip


def theirs_adapted(model, targets, options, seed=3):
    """PEFT's model, with every adapter weight drawn anew."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM", **options)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(adapted.named_parameters()):
            if "lora_" in name:
                weight.normal_(0, 0.2, generator=generator)
    return adapted


def some_tokens():
    return torch.randint(1, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model, tokens):
    return model.logits(model(tokens))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_parity_with_peft(case, tmp_path):
    kind, settings, targets, options = CASES[case]
    theirs = peer(kind, settings, tmp_path)
    model, tokens = import_huggingface(theirs.folder), some_tokens()
    base, before = logits_of(model, tokens), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = theirs_adapted(theirs.model, targets, options)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = adapted(tokens).logits
    assert float((base - expected).abs().max() / expected.abs().max()) > 0.1, "an adapter that changes nothing proves nothing"

    adapter = load_adapter(tmp_path / "adapter", model)
    with attached(model, adapter):
        close(logits_of(model, tokens), expected)
    assert torch.equal(logits_of(model, tokens), base), "detached, it is the base bit for bit"
    merge(model, adapter)
    close(logits_of(model, tokens), expected)
    assert {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])} == {
        f"{name}.weight" for name in adapter.parts
    }

    save_adapter(adapter, import_huggingface(theirs.folder), tmp_path / "back", base="a/model", family=theirs.architecture)
    fresh = type(theirs.model).from_pretrained(theirs.folder, attn_implementation="eager").eval()
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "back")
    ours, wanted = (load_file(tmp_path / name / WEIGHTS) for name in ("back", "adapter"))
    assert ours.keys() == wanted.keys() and all(torch.equal(ours[name], wanted[name]) for name in wanted)
    assert torch.equal(again(tokens).logits, expected)


@torch.no_grad()
def test_a_bug_would_be_seen(tmp_path):
    """The same comparison with B = 0, with another scale, and with q's rows where k's belong."""
    theirs = peer("GPT2", CASES["gpt2"][1], tmp_path)
    model, tokens = import_huggingface(theirs.folder), some_tokens()
    adapted = theirs_adapted(theirs.model, ["c_attn"], CASES["gpt2"][3])
    adapted.save_pretrained(tmp_path / "adapter")
    expected, adapter = adapted(tokens).logits, load_adapter(tmp_path / "adapter", model)
    q, k = (f"layers.0.mixer.f.{name}" for name in "qk")
    first = adapter.parts[q]
    wrong = {
        "zero": {q: LowRank(first.down, torch.zeros_like(first.up), first.alpha)},
        "scale": {q: LowRank(first.down, first.up, first.alpha, rslora=True)},
        "rows": {q: adapter.parts[k], k: first},
    }
    for planted in wrong.values():
        with attached(model, Adapter({**adapter.parts, **planted})), pytest.raises(AssertionError, match="relative error"):
            close(logits_of(model, tokens), expected)


@torch.no_grad()
def test_factors_that_differ_are_joined_exactly(tmp_path):
    """A trainer adapts q and v each with its own A; GPT-2's file has one matrix for q, k and v."""
    model = import_huggingface(peer("GPT2", CASES["gpt2"][1], tmp_path).folder)
    adapter, tokens = random_adapter(model, rank=3, targets=("q", "v", "out")), some_tokens()
    save_adapter(adapter, model, tmp_path / "adapter")
    again = load_adapter(tmp_path / "adapter", model)
    assert again.parts["layers.0.mixer.f.q"].rank == 6 and not again.parts["layers.0.mixer.f.k"].delta().any()
    for name, part in adapter.parts.items():
        torch.testing.assert_close(again.parts[name].delta(), part.delta(), rtol=1e-6, atol=1e-6)
    with attached(model, adapter):
        expected = logits_of(model, tokens)
    with attached(model, again):
        close(logits_of(model, tokens), expected)


def test_our_own_names_where_transformers_has_none(tmp_path):
    model = tiny_model(50, width=32)
    adapter = random_adapter(model)
    save_adapter(adapter, model, tmp_path)
    again = load_adapter(tmp_path, model)
    assert again.key == adapter.key and again.parts.keys() == adapter.parts.keys()


def test_a_new_adapter_is_the_base_and_learns():
    """The seam for a trainer: factors that want gradients, a model that has none."""
    model, tokens = tiny_model(50).requires_grad_(False), torch.randint(1, 50, (2, 12))
    adapter = LoRA(rank=4, targets=("q", "v", "gate")).build(model, seed=1)
    base = logits_of(model, tokens)
    with attached(model, adapter):
        assert torch.equal(logits_of(model, tokens), base)
        wanted = [factor for part in adapter.parts.values() for factor in (part.down, part.up)]
        gradients = torch.autograd.grad(model.logits(model(tokens)).square().mean(), wanted)
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients[1::2]), "every B learns at the first step"
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_several_adapters_are_those_of_each_alone(dtype):
    """Bit for bit in bfloat16 with native products; ranks that fill, straddle and exceed a block of 32."""
    part = Linear(96, 64)
    part.weight.requires_grad_(False).normal_()
    generator = torch.Generator().manual_seed(0)
    ranks = (4, 8, 13, 16, 20, 32, 40)
    random = lambda *shape: torch.randn(shape, generator=generator)
    parts = [LowRank(random(rank, 96), random(64, rank), 2.0 * rank) for rank in ranks]
    x = torch.randn(1, 4 * (len(ranks) + 1), 96, generator=generator).to(dtype)
    owners = torch.arange(-1, len(ranks)).repeat(4)
    stacked = Stacked(list(enumerate(parts)), part, dtype)
    stacked.rows = Rows(owners)
    together = stacked(x)[0]
    assert not together[owners == -1].any(), "a row of the base gets nothing"
    for number, one in enumerate(parts):
        alone = Stacked([(number, one)], part, dtype)(x)[0][owners == number]
        expected, tolerance = x[0, owners == number].float() @ one.delta().T, 1e-5 if dtype == torch.float32 else 2e-2
        close(together[owners == number].float(), expected, tolerance)
        if dtype == torch.bfloat16 and stacked.native:
            assert torch.equal(together[owners == number], alone)
    stacked.rows = Rows(owners.roll(1))  # planted: the masks of other rows
    assert not torch.equal(stacked(x)[0], together)


def test_no_adapter_crosses_a_border_of_32_columns():
    part = Linear(8, 8)
    part.weight.requires_grad_(False)
    ranks = (4, 20, 8, 40, 16, 2, 9, 64)
    parts = [LowRank(torch.zeros(rank, 8), torch.zeros(8, rank), 1.0) for rank in ranks]
    stacked = Stacked(list(enumerate(parts)), part, torch.float32)
    for number, rank in enumerate(ranks):
        start, count = stacked.layout.index(number), stacked.layout.count(number)
        assert count == width(rank) >= rank
        assert start % 32 == 0 if count >= 32 else start // 32 == (start + count - 1) // 32


def test_what_can_be_adapted():
    model = tiny_model(50)
    names = [f"mixer.f.{name}" for name in ("q", "k", "v", "out")] + [f"feedforward.f.{name}" for name in ("gate", "up", "out")]
    assert set(adaptable(model)) == {f"layers.{i}.{name}" for i in range(2) for name in names}
    with pytest.raises(UserError, match="no matrix is named 'query'"):
        LoRA(targets=("query",)).build(model)


# ---- what is refused


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A model of ours, and the folder of an adapter for it."""
    place = tmp_path_factory.mktemp("good")
    model = import_huggingface(peer("Llama", LLAMA, place).folder)
    save_adapter(random_adapter(model), model, place / "adapter")
    return model, place / "adapter"


def spoiled(good, tmp_path, config=None, tensors=None):
    folder = tmp_path / "spoiled"
    shutil.copytree(good, folder)
    if config is not None:
        said = json.loads((folder / CONFIG).read_text()) | config
        (folder / CONFIG).write_text(json.dumps({key: value for key, value in said.items() if value != "absent"}))
    if tensors is not None:
        held = load_file(folder / WEIGHTS)
        save_file({name: tensor for name, tensor in (held | tensors(held)).items() if tensor is not None}, folder / WEIGHTS)
    return folder


PLACE = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{PLACE}.lora_A.weight", f"{PLACE}.lora_B.weight"


def elsewhere(place):
    """What adds a second copy of a matrix's factors under another name."""
    return lambda held: {name.replace(PLACE, place): held[name].clone() for name in (A, B)}


REFUSED = {
    "another method": ({"peft_type": "IA3"}, None, "peft_type = 'IA3' is not supported"),
    "dora": ({"use_dora": True}, None, "use_dora = True is not supported"),
    "modules saved whole": ({"modules_to_save": ["lm_head"]}, None, "modules_to_save"),
    "biases": ({"bias": "all"}, None, "bias = 'all'"),
    "experts": ({"target_parameters": ["experts.gate"]}, None, "target_parameters"),
    "a start that changes the base": ({"init_lora_weights": "pissa"}, None, "changes the base's own weights"),
    "no rank": ({"r": "absent"}, None, "does not say r"),
    "alpha": ({"lora_alpha": "much"}, None, "is no number"),
    "a regular expression": ({"rank_pattern": {"(a+)+$": 4}}, None, "is a regular expression"),
    "another rank": ({"r": 6}, None, "lora_A is 4 × 48 and must be 6 × 48"),
    "another base": (None, lambda held: {A: torch.zeros(4, 48)}, "lora_A is 4 × 48 and must be 4 × 32"),
    "another output": (None, lambda held: {B: torch.zeros(48, 4)}, "lora_B is 48 × 4 and must be 32 × 4"),
    "half": (None, lambda held: {B: None}, "only one of lora_A and lora_B"),
    "an unknown target": (None, elsewhere(PLACE.replace("q_proj", "r_proj")), "can be adapted; the nearest is model.layers.0"),
    "the head": (None, elsewhere("base_model.model.lm_head"), "lm_head is no matrix of this model that can be adapted"),
    "a magnitude": (None, lambda held: {f"{PLACE}.lora_magnitude_vector": torch.ones(3)}, "only lora_A and lora_B"),
    "whole numbers": (None, lambda held: {A: torch.zeros(4, 32, dtype=torch.int8)}, "is I8"),
    "no numbers": (None, lambda held: {A: torch.full((4, 32), torch.nan)}, "not finite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_line(case, good, tmp_path):
    model, folder = good
    config, tensors, words = REFUSED[case]
    with pytest.raises(UserError) as caught:
        load_adapter(spoiled(folder, tmp_path, config, tensors), model)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_pickles_and_empty_folders_are_refused(good, tmp_path):
    model, folder = good
    with pytest.raises(UserError, match="no LoRA adapter"):
        load_adapter(tmp_path, model)
    shutil.copy(folder / CONFIG, tmp_path / CONFIG)
    with pytest.raises(UserError, match="may be incomplete"):
        load_adapter(tmp_path, model)
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UserError, match="pickle"):
        load_adapter(tmp_path, model)


def test_an_adapter_of_another_model_is_refused(good):
    model, _ = good
    other = random_adapter(tiny_model(50, width=64))
    with pytest.raises(UserError, match="another base"), attached(model, other):
        pass
    with pytest.raises(UserError, match="made for another one"):
        Adapter({"layers.7.mixer.f.q": next(iter(other.parts.values()))}).check(model)
