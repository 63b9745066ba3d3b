"""Parity with `transformers`: what every dialect must show, on tiny random models.

    CASES = {"gpt2": ("GPT2", {"n_embd": 24, ...}), ...}          # class of the config, settings; several of a family

    @pytest.mark.parametrize("name", CASES)
    def test_parity(name, tmp_path):
        check_causal(peer(*CASES[name], tmp_path), tmp_path)

`peer` makes the model of `transformers` with every weight and buffer drawn anew (defaults hide what is missing: biases are 0
and gains are 1), and its folder. For models that are no decoders, `same_after_round_trip` is the part that applies to all;
their outputs are compared by their own tests, with `close`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from headspring.models.dialects import export_huggingface, import_huggingface
from headspring.models.model import ModelModule

VOCAB, CONTEXT = 61, 96
COMMON = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
TOLERANCE = 1e-5  # relative to the largest value


@dataclass
class Peer:
    """A model of `transformers`, and the folder that it saved itself in."""

    model: Any
    folder: Path
    attention: str = "eager"

    @property
    def architecture(self) -> str:
        return json.loads((self.folder / "config.json").read_text())["architectures"][0]


def peer(
    kind: str,
    settings: dict[str, Any],
    place: Path,
    auto: str = "AutoModelForCausalLM",
    seed: int = 0,
    attention: str = "eager",
) -> Peer:
    """`kind` is the name of a config class without its end (`GPT2`); `auto` the class that makes the model from it."""
    config = getattr(transformers, f"{kind}Config")(**COMMON | settings)
    model = getattr(transformers, auto).from_config(config, attn_implementation=attention).float().eval()
    randomise(model, seed)
    model.save_pretrained(place / "theirs")
    return Peer(model, place / "theirs", attention)


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Every parameter drawn from N(0, 0.3²), or N(0.3, 0.3²) for vectors; stored buffers of numbers, too."""
    generator = torch.Generator().manual_seed(seed)
    stored = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for name in sorted(stored):
        stored[name].normal_(0.3 if stored[name].dim() == 1 else 0.0, 0.3, generator=generator)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error < tolerance, f"relative error {error:.1e}"


@torch.no_grad()
def check_causal(theirs: Peer, place: Path, tolerance: float = TOLERANCE, length: int = 40, vocab: int = VOCAB) -> ModelModule:
    """Logits, a left-padded batch and 32 greedy tokens with a cache are theirs; what goes back is bit for bit what came."""
    ours = import_huggingface(theirs.folder)
    tokens = torch.randint(1, vocab, (3, length), generator=torch.Generator().manual_seed(1))
    expected = theirs.model(tokens).logits
    close(ours.logits(ours(tokens)), expected, tolerance)
    same_when_padded(theirs.model, ours, tokens, tolerance)
    same_continuation(theirs.model, ours, tokens[:1, :9])
    same_after_round_trip(theirs, ours, place)
    again = transformers.AutoModelForCausalLM.from_pretrained(place / "ours", attn_implementation=theirs.attention).eval()
    close(again(tokens).logits, expected, 1e-6)  # the config said the same, too
    return ours


def same_when_padded(theirs: Any, ours: ModelModule, tokens: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """Rows of three lengths, padded on the left. Positions are given to those that do not count them themselves."""
    padding = torch.tensor([0, 7, tokens.shape[1] // 2])
    mask = torch.arange(tokens.shape[1]) >= padding[:, None]
    padded = torch.where(mask, tokens, 0)
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if takes(theirs, "position_ids") else {}
    expected = theirs(padded, attention_mask=mask.long(), **positions).logits
    close(ours.logits(ours(padded, padding=padding))[mask], expected[mask], tolerance)


def takes(model: Any, argument: str) -> bool:
    return (
        argument in model.forward.__code__.co_varnames
        or argument in getattr(getattr(model.forward, "__wrapped__", None), "__code__", model.forward.__code__).co_varnames
    )


def same_continuation(theirs: Any, ours: ModelModule, prompt: torch.Tensor, count: int = 32) -> None:
    """`count` greedy tokens, each with what came before in a cache."""
    mask = torch.ones_like(prompt)
    continued = theirs.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, attention_mask=mask)
    assert greedy(ours, prompt, count) == continued[0].tolist()


def greedy(model: ModelModule, prompt: torch.Tensor, count: int) -> list[int]:
    state, tokens, new = model.new_state(1), prompt, prompt
    for _ in range(count):
        new = model.logits(model(new, state=state)[:, -1:]).argmax(-1)
        tokens = torch.cat([tokens, new], dim=1)
    return tokens[0].tolist()


def same_after_round_trip(theirs: Peer, ours: ModelModule, place: Path) -> None:
    """Exported again, every tensor has the name, the dtype and the bits that it came with."""
    export_huggingface(ours, place / "ours", family=theirs.architecture)
    config = json.loads((place / "ours" / "config.json").read_text())
    assert config["architectures"] == [theirs.architecture]
    before, after = (load_file(folder / "model.safetensors") for folder in (theirs.folder, place / "ours"))
    assert before.keys() == after.keys(), before.keys() ^ after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
