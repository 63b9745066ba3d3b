"""GGUF models: the same function as other readers make of a file, there and back bit for bit, and what is refused."""

import struct
import tracemalloc

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from headspring.artifacts import CorruptArtifact, HeadspringError, UserError
from headspring.artifacts.gguf import Entry, GgufFile, write_gguf
from headspring.models import MLP, Attention, Block, Branch, Decoder, RMSNorm, RoPE, SwiGLU, repeat
from headspring.models.dialects.gguf import blocks, export_gguf, families, import_gguf
from headspring.models.dialects.moves import Pairs
from headspring.models.position.scaling import DynamicNTK, Linear, Llama3, LongRoPE, YaRN
from tests.models import gguf_blocks
from tests.models.conftest import randomise

VOCAB, CONTEXT = 61, 96
F32 = GGMLQuantizationType.F32


def decoder(attention: dict, norm=RMSNorm(epsilon=1e-5), **changes) -> Decoder:  # noqa: B008 (a frozen value)
    mixer = Branch(f=Attention(**{"heads": 4, "kv_heads": 2, "qk_norm": None} | attention), pre=norm)
    block = Block(mixer=mixer, feedforward=Branch(f=SwiGLU(hidden=96), pre=norm))
    return Decoder(**{"vocab": VOCAB, "width": 32, "layers": repeat(2, block), "context": CONTEXT, "norm": norm} | changes)


SIX = RMSNorm(epsilon=1e-6)
LONG = tuple(float(str(np.float32(1 + i / 3))) for i in range(8))
CASES = {
    "llama": decoder({"position": RoPE(theta=5e5)}, tied=False),
    "llama-tied-one-head": decoder({"kv_heads": 1}),
    "llama-head-dim": decoder({"head_dim": 10}, tied=False),
    "qwen2": decoder({"bias": True}, SIX),
    "qwen3": decoder({"qk_norm": SIX, "head_dim": 128}, SIX, tied=False),  # the only one that theirs reads
}


@pytest.fixture(params=CASES)
def model(request):
    return randomise(CASES[request.param].build(), seed=len(request.param))


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    before, after = one.state_dict(), other.state_dict()
    return before.keys() == after.keys() and all(
        before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_is_written_is_read_bit_for_bit(model, dtype, tmp_path):
    model.to(dtype)
    export_gguf(model, tmp_path / "a.gguf")
    back = import_gguf(tmp_path / "a.gguf")
    assert same(back, model)
    assert families_of(back) == families_of(model)
    export_gguf(back, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def families_of(model) -> tuple:
    return model.config.tied, model.config.context, model.config.norm, model.config.layers[0].mixer.f.position


SCALINGS = [
    Linear(factor=2.5),
    YaRN(factor=4.0, original_context=24),
    Llama3(),
    LongRoPE(factor=1.0, original_context=CONTEXT, short=LONG, long=LONG),
]


@pytest.mark.parametrize("scaling", [None, *SCALINGS], ids=lambda scaling: scaling and scaling.kind)
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_rotations(scaling, fraction, tmp_path):
    """Of a part of the channels, and stretched: the same value comes back, and half the channels need half the factors."""
    if isinstance(scaling, LongRoPE) and fraction < 1:
        scaling = scaling.model_copy(update={"short": LONG[:4], "long": LONG[:4]})
    model = randomise(decoder({"head_dim": 16, "position": RoPE(theta=5e5, fraction=fraction, scaling=scaling)}).build())
    export_gguf(model, tmp_path / "a.gguf")
    back = import_gguf(tmp_path / "a.gguf")
    assert same(back, model) and families_of(back) == families_of(model)
    tokens = torch.arange(1, 60)[None]
    torch.testing.assert_close(back.logits(back(tokens)), model.logits(model(tokens)))


@pytest.mark.parametrize(
    "scaling", [DynamicNTK(factor=2.0, original_context=9), YaRN(factor=2, original_context=9, beta_fast=9)]
)
def test_stretching_without_words_is_refused(scaling, tmp_path):
    with pytest.raises(UserError, match=r"position\.scaling"):
        export_gguf(decoder({"position": RoPE(scaling=scaling)}).build(), tmp_path / "a.gguf")


@torch.no_grad()
def test_transformers_reads_the_same_function(model, tmp_path):
    """Their reader has its own table of names and its own permutation: the oracle for ours."""
    transformers = pytest.importorskip("transformers")
    export_gguf(model, tmp_path / "a.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32)
    tokens = torch.randint(1, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
    ours = import_gguf(tmp_path / "a.gguf")
    expected = theirs(tokens).logits
    assert distance(ours, tokens, expected) < 1e-5
    if GgufFile(tmp_path / "a.gguf").metadata["general.architecture"] == "llama":
        q = ours.layers[0].mixer.f.q.weight  # the control: rows left in pairs are another function
        q.copy_(Pairs(4).out([q])[0])
        assert distance(ours, tokens, expected) > 1e-3


def distance(model, tokens, expected) -> float:
    return float((model.logits(model(tokens)) - expected).abs().max() / expected.abs().max())


def test_fused_matrices(tmp_path):
    """Phi-3, which no other architecture's table would say: q, k, v in one tensor, gate and up in another."""
    model = randomise(CASES["llama"].build())
    table = next(family for family in families.GGUF_FAMILIES if family.architecture == "phi3")
    metadata = table.write(model.config)
    metadata.pop(families.TIED)
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    qkv = {i: torch.cat([tensors[f"layers.{i}.mixer.f.{x}.weight"] for x in "qkv"]) for i in range(2)}
    up = {i: torch.cat([tensors[f"layers.{i}.feedforward.f.{x}.weight"] for x in ("gate", "up")]) for i in range(2)}
    found = {"token_embd": tensors["embed.weight"], "output_norm": tensors["norm.weight"], "output": tensors["head.weight"]}
    for i in range(2):
        found |= {f"blk.{i}.attn_qkv": qkv[i], f"blk.{i}.ffn_up": up[i]}
        found |= {f"blk.{i}.attn_norm": tensors[f"layers.{i}.mixer.pre.weight"]}
        found |= {f"blk.{i}.ffn_norm": tensors[f"layers.{i}.feedforward.pre.weight"]}
        found |= {f"blk.{i}.attn_output": tensors[f"layers.{i}.mixer.f.out.weight"]}
        found |= {f"blk.{i}.ffn_down": tensors[f"layers.{i}.feedforward.f.out.weight"]}
    write(tmp_path / "phi3.gguf", metadata, {f"{name}.weight": tensor for name, tensor in found.items()})
    assert same(import_gguf(tmp_path / "phi3.gguf"), model)


def write(path, metadata, tensors) -> None:
    write_gguf(path, metadata, [entry(name, tensor) for name, tensor in tensors.items()])


def entry(name: str, tensor: torch.Tensor) -> Entry:
    return Entry(name, F32, tuple(tensor.shape), lambda: tensor.numpy())


def test_the_format_is_the_peers(tmp_path):
    """The `gguf` package, which wrote the format's first files, finds in ours what we find."""
    export_gguf(randomise(CASES["llama"].build()), tmp_path / "a.gguf", "q8_0", {"general.name": "größer", "a.list": ["x", ""]})
    ours, theirs = GgufFile(tmp_path / "a.gguf"), GGUFReader(tmp_path / "a.gguf")
    for key, value in ours.metadata.items():
        assert theirs.fields[key].contents() == (pytest.approx(value) if isinstance(value, float) else value)
    assert {key for key in theirs.fields if not key.startswith("GGUF.")} == ours.metadata.keys()
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert (info.type, list(info.shape)[::-1]) == (tensor.tensor_type, tensor.shape.tolist())
        assert ours.content(tensor.name).tobytes() == tensor.data.tobytes()


# ---- block formats


@pytest.mark.parametrize("type", blocks.BLOCKS, ids=lambda type: type.name)
def test_a_block_means_what_its_definition_says(type, tmp_path):
    """Random bytes, with scales that are numbers; the definition in Python floats, ours in float32."""
    count, size = GGML_QUANT_SIZES[type]
    content = np.random.default_rng(0).integers(0, 256, (6, size), np.uint8)
    for at in {"Q6_K": (208,), "Q8_0": (0,), "Q4_0": (0,), "Q5_0": (0,)}.get(type.name, (0, 2)):
        content[:, at : at + 2] = np.random.default_rng(1).normal(size=6).astype("<f2").view(np.uint8).reshape(6, 2)
    write_gguf(tmp_path / "a.gguf", {}, [Entry("x", type, (3, 2 * count), lambda: content)])
    found = blocks.read(GgufFile(tmp_path / "a.gguf"), "x", torch.float32)
    definition = getattr(gguf_blocks, type.name.lower())
    expected = torch.tensor([definition(block.tobytes()) for block in content]).reshape(3, 2 * count)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    other = gguf_blocks.q4_0 if type.name == "Q5_0" else gguf_blocks.q5_0 if count == 32 else gguf_blocks.q6_k
    if type.name != "Q6_K":  # the control: another format's definition gives other numbers
        padded = [other(block.tobytes().ljust(256, b"\1")) for block in content]
        assert not torch.allclose(found, torch.tensor(padded).reshape(3, 2 * count), atol=1e-2)


@pytest.mark.parametrize("name", [name for name in blocks.WRITTEN if name.startswith("q")])
def test_quantized_writing_stays_within_half_a_step(name, tmp_path):
    model = randomise(CASES["llama"].build())
    export_gguf(model, tmp_path / "a.gguf", name)
    back = import_gguf(tmp_path / "a.gguf")
    for key, tensor in model.state_dict().items():
        if tensor.ndim == 1:
            assert torch.equal(back.state_dict()[key], tensor)
            continue
        grouped = tensor.reshape(-1, 32)
        reach = 2 * grouped.abs().amax(1, keepdim=True) if name.endswith("0") else grouped.amax(1, True) - grouped.amin(1, True)
        step = reach / (2 ** int(name[1]) - 1)
        error = (back.state_dict()[key].reshape(-1, 32) - grouped).abs()
        assert (error <= step * 1.1).all() and error.max() > 0


def test_rows_that_are_no_blocks_are_refused(tmp_path):
    model = decoder({"head_dim": 10}, width=24).build()
    with pytest.raises(UserError, match="rows of 24 values are no whole blocks of 32, which q8_0 needs"):
        export_gguf(model, tmp_path / "a.gguf", "q8_0")
    with pytest.raises(UserError, match="use float32"):
        export_gguf(model, tmp_path / "a.gguf", "int3")
    assert not list(tmp_path.iterdir())


def test_what_gguf_cannot_say_is_named(tmp_path):
    block = Block(mixer=Attention(heads=2), feedforward=MLP(hidden=16))
    model = Decoder(vocab=VOCAB, width=16, layers=repeat(1, block)).build()
    with pytest.raises(UserError, match=r"cannot express this model: layers\.0\.feedforward\.f"):
        export_gguf(model, tmp_path / "a.gguf")


# ---- bad files


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    export_gguf(randomise(CASES["qwen2"].build()), path, "q8_0")
    return path


def header(tensors: int = 0, values: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values) + rest


def text(content: str) -> bytes:
    return struct.pack("<Q", len(content)) + content.encode()


def tensor(name: str = "x", shape=(2**40, 2**40), type: int = 0, offset: int = 0, dimensions: int | None = None) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape) if dimensions is None else dimensions, *shape)
    return text(name) + sizes + struct.pack("<IQ", type, offset)


ROOM = bytes(256)
BAD = {
    "empty": (b"", "is empty"),
    "no gguf": (b"PK\3\4" + ROOM, "is no GGUF file"),
    "version 1": (header(version=1), "of version 1"),
    "big-endian": (header(version=3 << 24), "other byte order"),
    "endless tensors": (header(tensors=2**60, rest=ROOM), "claims 1152921504606846976 tensors"),
    "endless values": (header(values=2**63, rest=ROOM), "values, more than its"),
    "endless string": (header(values=1, rest=struct.pack("<Q", 2**63) + ROOM), "ends at byte"),
    "endless array": (header(values=1, rest=text("a") + struct.pack("<IIQ", 9, 5, 2**62) + ROOM), "ends at byte"),
    "endless strings": (header(values=1, rest=text("a") + struct.pack("<IIQ", 9, 8, 2**61) + ROOM), "strings at byte"),
    "nested arrays": (header(values=1, rest=text("a") + struct.pack("<IIQ", 9, 9, 1) + ROOM), "array of arrays"),
    "unknown value": (header(values=1, rest=text("a") + struct.pack("<I", 13) + ROOM), "unknown type 13"),
    "same key": (header(values=2, rest=2 * (text("a") + struct.pack("<II", 4, 1)) + ROOM), "key 'a' twice"),
    "not utf-8": (header(values=1, rest=struct.pack("<Q", 1) + b"\xff" + ROOM), "not UTF-8"),
    "alignment": (header(values=1, rest=text("general.alignment") + struct.pack("<II", 4, 3) + ROOM), "no power of two"),
    "large tensor": (header(tensors=1, rest=tensor() + ROOM), "cut off"),
    "no dimensions": (header(tensors=1, rest=tensor(dimensions=0) + ROOM), "0 dimensions"),
    "many dimensions": (header(tensors=1, rest=tensor(dimensions=2**31) + ROOM), "dimensions"),
    "empty tensor": (header(tensors=1, rest=tensor(shape=(0,)) + ROOM), "no whole blocks"),
    "half a block": (header(tensors=1, rest=tensor(shape=(33,), type=8) + ROOM), "no whole blocks of 32"),
    "unknown type": (header(tensors=1, rest=tensor(type=999) + ROOM), "unknown type 999"),
    "removed type": (header(tensors=1, rest=tensor(type=4) + ROOM), "unknown type 4"),
    "far away": (header(tensors=1, rest=tensor(shape=(1,), offset=2**62) + ROOM), "cut off"),
    "unaligned": (header(tensors=1, rest=tensor(shape=(1,), offset=1) + ROOM), "unaligned"),
    "same name": (header(tensors=2, rest=tensor(shape=(1,)) + tensor(shape=(1,), offset=32) + ROOM), "'x' twice"),
    "same bytes": (header(tensors=2, rest=tensor("x", (1,)) + tensor("y", (1,)) + ROOM), "over another one"),
    "no model": (header(rest=ROOM), "says nothing of its architecture"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "why"), BAD.values(), ids=BAD)
def test_a_bad_file_is_refused_without_memory(content, why, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=why) as error:
            import_gguf(tmp_path / "bad.gguf")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert "bad.gguf" in str(error.value) and "\n" not in str(error.value)


def changed(whole, path, metadata=(), tensors=(), without=()):
    """The whole file with other metadata or tensors."""
    file = GgufFile(whole)
    kept = {name: blocks.read(file, name, torch.float32) for name in file.tensors if name not in without}
    write(path, {**file.metadata, **dict(metadata)}, {**kept, **dict(tensors)})


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"metadata": {"general.architecture": "lama"}},
            r"'lama' is not supported \(it needs .*nearest.*: llama,",
        ),
        ({"metadata": {"split.count": 3}}, "is one of 3 parts"),
        ({"metadata": {"qwen2.logit_scale": 2.0}}, "setting 'logit_scale' is not supported"),
        ({"metadata": {"qwen2.expert_count": 8}}, "expert_count = 8 is not supported"),
        ({"metadata": {"qwen2.rope.scaling.type": "longrope"}}, "rope.scaling.type = 'longrope' is not supported; none,"),
        ({"metadata": {"qwen2.rope.dimension_count": 9}}, "dimension_count = 9|fraction"),
        ({"metadata": {"qwen2.rope.scaling.type": "linear", "qwen2.rope.scaling.factor": 0.5}}, "factor"),
        ({"metadata": {"qwen2.attention.value_length": 4}}, "value_length = 4 beside keys of 8"),
        ({"metadata": {"qwen2.block_count": 2**31}}, "block_count = 2147483648, and the file has 26 tensors"),
        ({"metadata": {"qwen2.block_count": np.array([2**31], "<u4")}}, "block_count is no number"),
        ({"metadata": {"qwen2.attention.head_count": np.array([4, 2], "<u4")}}, "differs from layer to layer"),
        ({"metadata": {"qwen2.embedding_length": 2**31}}, "× 2147483648"),
        ({"metadata": {"qwen2.embedding_length": "wide"}}, "embedding_length is no number"),
        ({"metadata": {"qwen2.attention.head_count": 0}}, "describes no"),
        ({"without": ["blk.1.ffn_up.weight"]}, "missing blk.1.ffn_up.weight"),
        ({"without": ["token_embd.weight"]}, "no language model"),
        ({"tensors": {"rope_freqs.weight": torch.ones(4)}}, "rope_freqs.weight have no place"),
        ({"tensors": {"blk.0.attn_k.weight": torch.ones(8, 32)}}, "8 × 32, the config makes it 16 × 32"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(*value.values())[:40],
)
def test_what_is_not_supported_is_named(whole, changes, why, tmp_path):
    changed(whole, tmp_path / "other.gguf", **changes)
    with pytest.raises(UserError, match=why) as error:
        import_gguf(tmp_path / "other.gguf")
    assert "other.gguf" in str(error.value) and "\n" not in str(error.value)


def test_a_setting_a_layer_that_is_the_same_everywhere(whole, tmp_path):
    changed(whole, tmp_path / "a.gguf", {"qwen2.attention.head_count_kv": np.array([2, 2], "<u4")})
    assert import_gguf(tmp_path / "a.gguf").config == import_gguf(whole).config


def test_a_number_format_that_is_not_supported(whole, tmp_path):
    content = bytearray(whole.read_bytes())
    name = b"token_embd.weight"
    at = content.index(name) + len(name) + 4 + 16
    assert content[at] == GGMLQuantizationType.Q8_0
    content[at] = GGMLQuantizationType.IQ4_NL  # blocks of 32 in fewer bytes, so that the file stays whole
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(UserError, match=r"'token_embd.weight' is IQ4_NL; those that can be read are F32, .*Q6_K"):
        import_gguf(tmp_path / "a.gguf")


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_a_damaged_file_is_a_damaged_file(whole, tmp_path_factory, data):
    """Whatever bytes change, and wherever it ends: a model, or one of our errors, and memory of the file's order."""
    content = bytearray(whole.read_bytes())
    end = content.index(b"output_norm.weight") + 64  # most of what can go wrong stands before the numbers
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, end), st.integers(0, 255)), max_size=4)):
        content[at] = value
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(content))))
    path = tmp_path_factory.mktemp("fuzz") / "a.gguf"
    path.write_bytes(content[:cut])
    try:
        assert import_gguf(path) is not None
    except HeadspringError as error:
        assert "a.gguf" in str(error)


def test_cut_off_anywhere_is_noticed(whole, tmp_path):
    content = whole.read_bytes()
    for cut in [*range(0, 3000, 37), len(content) - 33]:
        (tmp_path / "a.gguf").write_bytes(content[:cut])
        with pytest.raises(CorruptArtifact):
            import_gguf(tmp_path / "a.gguf")
