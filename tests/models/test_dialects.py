"""Hugging Face dialects: tables and moves in both directions, files that are read and refused. (Parity has its own files.)"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from headspring.artifacts import CorruptArtifact, UserError
from headspring.models import Attention, Block, Branch, Causal, Decoder, LayerNorm, NoPE, RMSNorm, RoPE, SwiGLU, repeat
from headspring.models.dialects import export_huggingface, expresses, import_huggingface
from headspring.models.dialects.moves import (
    Alternating,
    Grouped,
    Pairs,
    Reshaped,
    Rows,
    Stacked,
    Transposed,
    moved_shapes,
    then,
)
from headspring.models.dialects.rules import Rule, complete
from tests.models.conftest import randomise, small_decoder
from tests.models.parity import close, peer

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 24, "intermediate_size": 44, "num_attention_heads": 4, "num_hidden_layers": 2}


@pytest.mark.parametrize("wrong", ["q_and_k", "rotation", "epsilon", "norm"])
@torch.no_grad()
def test_the_comparison_sees_a_wrong_import(wrong, tmp_path):
    """The control: with weights as random as these, every one of the usual mistakes moves the logits."""
    theirs = peer("Llama", SIZES, tmp_path)
    ours = import_huggingface(theirs.folder)
    attention = ours.layers[0].mixer.f
    if wrong == "q_and_k":
        attention.q, attention.k = attention.k, attention.q
    if wrong == "rotation":  # neighbours in the place of halves
        attention.q.weight.copy_(attention.q.weight.view(4, 2, 3, -1).transpose(1, 2).reshape(24, 24))
    if wrong == "epsilon":
        ours.layers[1].mixer.pre.epsilon = 1e-2
    if wrong == "norm":
        ours.layers[1].mixer.pre.weight += 1.0
    tokens = torch.randint(1, 61, (2, 20))
    with pytest.raises(AssertionError, match="relative error"):
        close(ours.logits(ours(tokens)), theirs.model(tokens).logits, tolerance=1e-4)


MOVES = {
    "rows": (Rows(), [(4, 3), (2, 3)]),
    "columns": (Rows(axis=1), [(3, 4), (3, 2)]),
    "transposed": (then(Rows(), Transposed()), [(4, 3), (2, 3)]),
    "grouped": (Grouped(2), [(4, 3), (2, 3), (6, 3)]),
    "grouped-vectors": (Grouped(2), [(4,), (2,)]),
    "alternating": (Alternating(), [(4, 3), (4, 3)]),
    "alternating-within": (then(Transposed(), Alternating(axis=-1)), [(2, 4, 3), (2, 4, 3)]),
    "pairs": (Pairs(3), [(18, 5)]),
    "pairs-partial": (Pairs(2, rotated=4, skipped=3), [(18, 5)]),
    "stacked": (then(Transposed(), Stacked()), [(3, 4, 2)]),
    "reshaped": (Reshaped((4, 1, 3)), [(4, 3)]),
}


@pytest.mark.parametrize("name", MOVES)
def test_a_move_and_its_inverse_change_no_bit(name):
    """Whatever the values, NaN included; and theirs hold every number of ours."""
    move, shapes = MOVES[name]
    ours = [torch.empty(shape, dtype=torch.int32).random_(-(2**31), 2**31).view(torch.float32) for shape in shapes]
    theirs = move.out(ours)
    assert [tuple(tensor.shape) for tensor in theirs] == moved_shapes(move, shapes)
    back = move.back(theirs, shapes)
    assert all(torch.equal(a.contiguous().view(torch.int32), b.view(torch.int32)) for a, b in zip(back, ours, strict=True))
    assert sum(tensor.numel() for tensor in theirs) == sum(tensor.numel() for tensor in ours)


def test_moves_by_hand():
    q, k, v = torch.tensor([0, 1, 2, 3]), torch.tensor([10, 11]), torch.tensor([20, 21])
    assert Grouped(2).out([q, k, v])[0].tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert Alternating().out([k, v])[0].tolist() == [10, 20, 11, 21]
    assert Pairs(1).out([q])[0].tolist() == [0, 2, 1, 3]
    assert Pairs(1, rotated=2, skipped=1).out([q])[0].tolist() == [0, 1, 2, 3]
    assert Pairs(1, rotated=4, skipped=1).out([torch.arange(6)])[0].tolist() == [0, 1, 3, 2, 4, 5]


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
        ({"hidden_size": 10**9}, r"is 61 × 32, the config makes it 61 × 1000000000"),
        ({"hidden_size": 2**62, "head_dim": 8}, r"config\.json: "),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers = 1000000000, and the file has \d+ tensors"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers = 'two' is no count"),
        ({"architectures": ["LlamaForCausalLLM"]}, "'LlamaForCausalLLM' is not supported; the nearest .*: LlamaForC.*a file"),
        ({"architectures": ["WaveForCausalLM"]}, "'WaveForCausalLM' is not supported; the nearest that are: "),
        ({"architectures": ["LlamaForSequenceClassification"]}, "not supported"),
        ({"architectures": None, "model_type": "llame"}, "model_type 'llame' is not supported; the nearest that are: llama"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, r"missing model\.layers\.0\.self_attn\.q_proj\.bias \(our"),
        ({"mlp_bias": True}, r"missing model\.layers\.0\.mlp\.gate_proj\.bias"),
        ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, "rope_type 'spiral' is not supported; those that are: default, "),
        ({"rope_scaling": {"type": "linear", "factr": 2.0}}, "'factr' is no setting of a rotation of type 'linear'"),
        ({"rope_scaling": {"type": "yarn", "factor": 0.1}}, "describes no LlamaForCausalLM: factor: "),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "'full_attention' is no setting of a rotation"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported here: the family turns whole heads"),
        ({"quantization_config": {"bits": 4}}, "quantized weights are not supported"),
        ({"use_sliding_window": True, "sliding_window": 8}, "windowed attention is not supported for LlamaForCausalLM"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "windowed attention is not"),
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
    assert import_huggingface(folder).config.layers[0].mixer.f.mask == Causal(window=4096)


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
        (
            small_decoder(norm=LayerNorm(epsilon=1e-6)),
            r"cannot express this model: .* of kind '\w+', and \w+ has a \w+ there",
        ),
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
