"""Hugging Face dialects: the same function as `transformers`, there and back bit for bit, and what is refused."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from headspring.artifacts import CorruptArtifact, UserError
from headspring.models import Attention, Block, Branch, Decoder, LayerNorm, NoPE, RMSNorm, RoPE, SwiGLU, repeat
from headspring.models.decoder import DecoderModule
from headspring.models.dialects import export_huggingface, expresses, import_huggingface
from headspring.models.dialects.llama import FAMILIES
from headspring.models.dialects.rules import Rule, complete, expand, to_ours, to_theirs
from tests.models.conftest import randomise, small_decoder

transformers = pytest.importorskip("transformers")

VOCAB, CONTEXT = 61, 96
SIZES = {"vocab_size": VOCAB, "num_hidden_layers": 2, "max_position_embeddings": CONTEXT, "pad_token_id": 0}
ENDLESS = {"bos_token_id": None, "eos_token_id": None}
SMALL = {"hidden_size": 24, "intermediate_size": 44, "num_attention_heads": 4}
CASES = {
    "llama-mha": ("Llama", SMALL),
    "llama-gqa-tied": ("Llama", SMALL | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama-head-dim": ("Llama", SMALL | {"num_key_value_heads": 1, "head_dim": 10, "rms_norm_eps": 1e-5}),
    "qwen2": ("Qwen2", SMALL | {"num_key_value_heads": 2}),
    "qwen2-tied": ("Qwen2", SMALL | {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", SMALL | {"num_key_value_heads": 2, "head_dim": 12}),
    "qwen3-odd": ("Qwen3", SMALL | {"hidden_size": 23, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 14,
                                    "tie_word_embeddings": True,
                                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "mistral": ("Mistral", SMALL | {"num_key_value_heads": 2, "sliding_window": None}),
    "mistral-wide-window": ("Mistral", SMALL | {"num_key_value_heads": 2, "sliding_window": CONTEXT}),
    "phi3": ("Phi3", SMALL | {"num_key_value_heads": 2}),
}  # fmt: skip


@pytest.fixture(params=CASES)
def peer(request, tmp_path):
    """A random model of `transformers` and its folder."""
    name, sizes = CASES[request.param]
    config = getattr(transformers, f"{name}Config")(**SIZES, **ENDLESS, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomise(model, seed=len(request.param))
    model.save_pretrained(tmp_path / "theirs")
    return model, tmp_path / "theirs"


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def architecture(folder) -> str:
    return json.loads((folder / "config.json").read_text())["architectures"][0]


@torch.no_grad()
def test_parity_and_the_way_back(peer, tmp_path):
    """Logits, a padded batch and a greedy continuation are theirs; what goes back is bit for bit what came."""
    theirs, folder = peer
    ours = import_huggingface(folder)
    tokens = torch.randint(1, VOCAB, (3, 40), generator=torch.Generator().manual_seed(1))
    assert relative(ours.logits(ours(tokens)), theirs(tokens).logits) < 1e-5

    padding = torch.tensor([0, 7, 19])
    mask = torch.arange(40) >= padding[:, None]
    padded = torch.where(mask, tokens, 0)
    expected = theirs(padded, attention_mask=mask.long(), position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    assert relative(ours.logits(ours(padded, padding=padding))[mask], expected[mask]) < 1e-5

    prompt = tokens[:1, :9]
    continued = theirs.generate(prompt, max_new_tokens=32, do_sample=False, attention_mask=torch.ones_like(prompt))
    assert greedy(ours, prompt, 32) == continued[0].tolist()

    export_huggingface(ours, tmp_path / "ours", family=architecture(folder))
    assert architecture(tmp_path / "ours") == architecture(folder)
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "ours"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert torch.equal(again(tokens).logits, theirs(tokens).logits)  # the config said the same, too


def greedy(model: DecoderModule, prompt: torch.Tensor, count: int) -> list[int]:
    state, tokens, new = model.new_state(1), prompt, prompt
    for _ in range(count):
        new = model.logits(model(new, state=state)[:, -1:]).argmax(-1)
        tokens = torch.cat([tokens, new], dim=1)
    return tokens[0].tolist()


@pytest.mark.parametrize("wrong", ["q_and_k", "rotation", "epsilon", "norm"])
@torch.no_grad()
def test_the_comparison_sees_a_wrong_import(wrong, tmp_path):
    """The control: with weights as random as these, every one of the usual mistakes moves the logits."""
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES, **SMALL))
    randomise(theirs).eval().save_pretrained(tmp_path)
    ours = import_huggingface(tmp_path)
    attention = ours.layers[0].mixer.f
    if wrong == "q_and_k":
        attention.q, attention.k = attention.k, attention.q
    if wrong == "rotation":  # neighbours in the place of halves
        attention.q.weight.copy_(attention.q.weight.view(4, 2, 3, -1).transpose(1, 2).reshape(24, 24))
    if wrong == "epsilon":
        ours.layers[1].mixer.pre.epsilon = 1e-2
    if wrong == "norm":
        ours.layers[1].mixer.pre.weight += 1.0
    tokens = torch.randint(1, VOCAB, (2, 20))
    assert relative(ours.logits(ours(tokens)), theirs(tokens).logits) > 1e-4


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_export_of_import_is_the_same_for_every_table(data):
    """Each table runs in both directions without a bit changed, whatever the sizes and the values, NaN included."""
    family = data.draw(st.sampled_from(FAMILIES))
    heads, channels = data.draw(st.integers(1, 4)), 2 * data.draw(st.integers(1, 4))
    kv_heads = data.draw(st.sampled_from([k for k in range(1, heads + 1) if heads % k == 0]))
    attention = Attention(heads=heads, kv_heads=kv_heads, head_dim=channels, bias=family.bias,
                          qk_norm=RMSNorm() if family.qk_norm else None)  # fmt: skip
    block = Block(mixer=attention, feedforward=SwiGLU(hidden=data.draw(st.integers(1, 9))))
    layers, tied = repeat(data.draw(st.integers(1, 3)), block), data.draw(st.booleans())
    model = Decoder(vocab=7, width=data.draw(st.integers(1, 9)), layers=layers, tied=tied).build()
    for parameter in model.parameters():
        parameter.data.view(torch.int32).random_(-(2**31), 2**31)
    ours = model.state_dict()
    rules = list(expand(family.rules(tied), len(layers)))
    complete(rules, ours)
    back = to_ours(rules, to_theirs(rules, ours), {name: tuple(tensor.shape) for name, tensor in ours.items()})
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name].view(torch.int32), ours[name].view(torch.int32)) for name in ours)


def test_an_incomplete_table_is_a_defect():
    with pytest.raises(AssertionError, match=r"head\.weight"):
        complete([Rule("a", "embed.weight")], {"embed.weight": 0, "head.weight": 0})
    with pytest.raises(AssertionError):
        complete([Rule("a", "embed.weight"), Rule("b", "embed.weight")], {"embed.weight": 0})


def test_dtype_and_special_tokens_are_kept(model, tmp_path):
    export_huggingface(model.bfloat16(), tmp_path, tokens={"eos_token_id": [2, 5]})
    assert import_huggingface(tmp_path).embed.weight.dtype == torch.bfloat16
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (config.dtype, config.eos_token_id, config.bos_token_id) == (torch.bfloat16, [2, 5], None)


# ---- reading what lies on disk


@pytest.fixture
def folder(tmp_path):
    """A Llama that we wrote."""
    export_huggingface(randomise(llama().build()), tmp_path)
    return tmp_path


def llama(**attention) -> Decoder:
    block = Block(mixer=Attention(heads=4, kv_heads=2, **{"qk_norm": None, **attention}), feedforward=SwiGLU(hidden=48))
    return small_decoder(layers=repeat(2, block), tied=False)


def edit(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in (config | changes).items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_old_and_new_names_of_the_rotary_base_are_read(folder):
    edit(folder, rope_parameters="absent", rope_theta=5e5)
    assert import_huggingface(folder).config.layers[0].mixer.f.position == RoPE(theta=5e5)
    edit(folder, rope_theta="absent", rope_parameters={"rope_type": "default", "rope_theta": 7e4})
    assert import_huggingface(folder).config.layers[0].mixer.f.position == RoPE(theta=7e4)
    edit(folder, rope_parameters="absent")
    assert import_huggingface(folder).config.layers[0].mixer.f.position == RoPE(theta=1e4)


def test_shards_are_one_model(folder, tmp_path):
    whole = import_huggingface(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    sharded = import_huggingface(tmp_path / "shards")
    assert sharded.config == whole.config
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), sharded.parameters()))
    next((tmp_path / "shards").glob("model-00002*")).unlink()
    with pytest.raises(CorruptArtifact, match="model-00002"):
        import_huggingface(tmp_path / "shards")
    index = tmp_path / "shards" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../model.safetensors"}}))
    with pytest.raises(UserError, match="not the name of a file in this folder"):
        import_huggingface(tmp_path / "shards")


def test_copies_that_follow_from_the_rest_are_left_out(tmp_path):
    export_huggingface(randomise(small_decoder().build()), tmp_path)

    def add(tensors, head=None):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone() if head is None else head

    edit_weights(tmp_path, add)
    assert import_huggingface(tmp_path).head is None
    edit_weights(tmp_path, lambda tensors: add(tensors, torch.zeros(61, 32)))
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        import_huggingface(tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": ["LlamaForCausalLLM"]}, "'LlamaForCausalLLM' is not supported; the nearest that are: Llama"),
        ({"architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM' is not supported; the nearest that are: Llama"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "not supported"),
        ({"architectures": None, "model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling = .*linear"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters = .*llama3"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters = .*full_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantized weights are not supported"),
        ({"use_sliding_window": True, "sliding_window": 8}, "sliding_window = 8 is in use"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"vocab_size": "absent"}, "config.json does not say 'vocab_size'"),
        ({"num_attention_heads": 0}, "greater than 0"),
        ({"hidden_size": "wide"}, "config.json describes no LlamaForCausalLM"),
        ({"num_key_value_heads": 3}, "multiple of kv_heads"),
        ({"hidden_size": 30, "head_dim": None}, "multiple of heads"),
        ({"vocab_size": 62}, r"model\.embed_tokens\.weight \(our embed\.weight\) is 61 × 32, the config makes it 62 × 32"),
        ({"num_hidden_layers": 3}, r"missing model\.layers\.2\..* \(our layers\.2\..*and .* more"),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\..* have no place"),
        ({"architectures": ["Phi3ForCausalLM"]}, r"qkv_proj.* \(our layers\.0\.mixer\.f\.q\.weight \+ .*k\.weight \+"),
    ],
    ids=str,
)  # fmt: skip
def test_what_the_decoder_does_not_express_is_refused_by_name(folder, changes, says):
    edit(folder, **changes)
    with pytest.raises(UserError, match=says) as caught:
        import_huggingface(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_window_that_config_json_leaves_out_is_not_forgotten(folder):
    edit(folder, architectures=["MistralForCausalLM"], sliding_window="absent", max_position_embeddings=8192)
    with pytest.raises(UserError, match="sliding_window = 4096 is in use"):
        import_huggingface(folder)


def test_pickle_and_absent_and_damaged_files(folder):
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CorruptArtifact, match=r"model\.safetensors: its tensors differ"):
        import_huggingface(folder)
    weights.write_bytes(content[:100])
    with pytest.raises(CorruptArtifact, match=r"model\.safetensors: cannot be read"):
        import_huggingface(folder)
    weights.unlink()
    with pytest.raises(UserError, match="no weights here"):
        import_huggingface(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match="pickle files can run code"):
        import_huggingface(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CorruptArtifact, match="not JSON"):
        import_huggingface(folder)
    with pytest.raises(UserError, match=r"no config\.json here"):
        import_huggingface(folder / "nowhere")


def test_integers_are_no_weights(folder):
    edit_weights(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(61, 32, dtype=torch.int8)}))
    with pytest.raises(UserError, match=r"lm_head\.weight is I8"):
        import_huggingface(folder)


# ---- writing what the format has no words for


def sandwich() -> Decoder:
    mixer = Branch(f=Attention(heads=4, qk_norm=None), post=RMSNorm())
    return small_decoder(layers=repeat(2, Block(mixer=mixer, feedforward=SwiGLU(hidden=48))))


def two_layers(first: Block, second: Block) -> Decoder:
    return small_decoder(layers=(first, second))


PLAIN = Block(mixer=Attention(heads=4, qk_norm=None), feedforward=SwiGLU(hidden=48))
WIDER = Block(mixer=Attention(heads=4, qk_norm=None), feedforward=SwiGLU(hidden=50))


@pytest.mark.parametrize(
    ("decoder", "says"),
    [
        (llama(position=NoPE()), r"layers\.0\.mixer\.f\.position\.kind is 'nope' and would become 'rope'"),
        (llama(bias=True, qk_norm=RMSNorm()), r"layers\.0\.mixer\.f\.(bias|qk_norm)"),
        (llama(qk_norm=RMSNorm(epsilon=0.5)), r"layers\.0\.mixer\.f\.qk_norm\.epsilon is 0\.5"),
        (sandwich(), r"layers\.0\.mixer\.post"),
        (two_layers(PLAIN, WIDER), r"layers\.1\.feedforward\.f\.hidden is 50 and would become 48"),
        (small_decoder(norm=LayerNorm(epsilon=1e-6)), r"norm\.kind is 'layer_norm' and would become 'rms_norm'"),
    ],
    ids=["nope", "bias-and-qk-norm", "epsilon", "post-norm", "unequal-layers", "layer-norm"],
)
def test_what_no_format_says_is_refused_with_the_field(decoder, says, tmp_path):
    assert expresses(decoder) is None
    with pytest.raises(UserError, match=says):
        export_huggingface(decoder.build(), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_the_family_is_found_or_given(tmp_path):
    assert expresses(small_decoder()) == "Qwen3ForCausalLM"
    assert expresses(llama()) == "LlamaForCausalLM"
    assert expresses(llama(bias=True)) == "Qwen2ForCausalLM"
    with pytest.raises(UserError, match=r"Qwen3ForCausalLM cannot express this model: layers\.0\.mixer\.f\.qk_norm"):
        export_huggingface(llama().build(), tmp_path, family="Qwen3ForCausalLM")
    with pytest.raises(UserError, match="'Gpt2' is not supported"):
        export_huggingface(llama().build(), tmp_path, family="Gpt2")
