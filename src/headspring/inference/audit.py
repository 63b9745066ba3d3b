"""Load two models, run the same tokens, and report where they part: what `headspring audit --compare` does.

The other model may be loaded by `transformers` instead of by us. Then what is compared is our reading of a folder with the
reading of those who wrote the format.
"""

from pathlib import Path
from typing import Any

import torch

from headspring.artifacts import UserError
from headspring.artifacts.files import read_json
from headspring.inference.loading import download, find, is_gguf, read_model
from headspring.models.comparison import Difference, check_comparable, compare, observe, windows_seen
from headspring.models.comparison.observing import Seen, observe_reference
from headspring.models.dialects.registry import of_config
from headspring.models.folder import is_native
from headspring.models.model import ModelModule

REFERENCES = ("headspring", "transformers")
LONGEST = 512  # tokens, where nobody says how many


def audit(
    source: str | Path,
    other: str | Path,
    reference: str = "headspring",
    length: int | None = None,
    revision: str | None = None,
) -> dict[str, Any]:
    """The first place where the models at `source` and `other` differ, and the mistakes that explain it, as plain values.

    `reference` is what loads the other one. `length` is the number of tokens (default: enough to see beyond every window, up
    to 512). Raises `UserError` for what cannot be loaded or compared.
    """
    if reference not in REFERENCES:
        raise UserError(f"reference {reference!r} is unknown; use {' or '.join(REFERENCES)}")
    here = _load(source, revision)
    tokens, unseen = _tokens(here, length)
    if reference == "transformers":
        found = compare(here, _reference(Path(other), here, tokens), tokens)
    else:
        there = _load(other, revision)
        check_comparable(here, there)
        found = compare(here, observe(there, tokens), tokens, there)
    return _report(found, str(source), str(other), reference, tokens.shape[1], unseen)


def _load(source: str | Path, revision: str | None) -> ModelModule:
    """The model in float32, whatever it is stored in."""
    place = find(source)
    model = read_model(place.folder or download(place.name, revision), torch.float32)
    return model.eval()


def _tokens(model: ModelModule, length: int | None) -> tuple[torch.Tensor, list[int]]:
    """Random tokens (2, T) int64, the same for every model of a vocabulary, and the windows that they do not reach beyond."""
    context, windows = model.config.context, windows_seen(model)
    wanted = length or min(LONGEST, max([64, *(window + 2 for window in windows)]))
    if length is not None and not 2 <= length <= context:
        raise UserError(f"{length} tokens cannot be compared; the model takes 2 to {context}")
    wanted = min(wanted, context)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab, (2, wanted), generator=generator)
    return tokens, sorted(window for window in windows if window >= wanted)


def _reference(folder: Path, here: ModelModule, tokens: torch.Tensor) -> Seen:
    """What `transformers` computes from a folder, by the names of ours."""
    if not folder.is_dir() or is_gguf(folder) or is_native(folder):
        raise UserError(f"{folder}: transformers reads a Hugging Face folder; take one, or --reference headspring")
    form = of_config(read_json(folder / "config.json"))
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise UserError("transformers is not installed: pip install transformers, or use --reference headspring") from None
    try:
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        raise UserError(f"{folder}: transformers cannot load it ({str(error).strip().splitlines()[0][:160]})") from error
    if theirs.config.vocab_size != here.config.vocab:
        raise UserError(f"the models have {here.config.vocab} and {theirs.config.vocab_size} tokens: nothing to compare")
    shapes = {name: tuple(tensor.shape) for name, tensor in here.state_dict().items()}
    return observe_reference(theirs.eval(), form.rules(here.config), shapes, tokens)


def _report(found: Difference, source: str, other: str, reference: str, tokens: int, unseen: list[int]) -> dict[str, Any]:
    return {
        "model": source,
        "other": other,
        "reference": reference,
        "equal": found.place is None,
        "place": found.place,
        "error": _finite(found.error),
        "equal_places": found.equal,
        "logits_error": _finite(found.logits),
        "causes": list(found.causes),
        "tried": found.tried,
        "tokens": tokens,
        "windows_not_reached": unseen,
    }


def _finite(error: float) -> float | None:
    """JSON has no infinity: None stands for tensors of different sizes."""
    return error if error != float("inf") else None
