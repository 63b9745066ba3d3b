"""Two models on the same tokens: the first place where they part, and the mistake that explains it.

    seen = [(name, activation), …] of both → first name whose activations differ → hypotheses about that part, tried in turn

An error deep in a model spreads to everything behind it; the first place is where it was made. Places are the outputs of
matrices and norms and the sites of a model (`observing`), so that a wrong projection, a wrong rotation of a right one, and a
wrong mask over right scores are told apart. `hypotheses` has the list of mistakes. What this gives up: the comparison sees
only what the tokens show; a window that no token is beyond looks right.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from headspring.artifacts.errors import UserError
from headspring.models.comparison.hypotheses import Hypothesis, known, moved, settings
from headspring.models.comparison.observing import LOGITS, Seen, observe
from headspring.models.model import Model, ModelModule
from headspring.models.stack import Stack

TOLERANCE = 1e-4  # relative to the largest value at a place, in float32
ENDS = ""  # what is not in a layer

__all__ = ["TOLERANCE", "Difference", "compare", "observe"]


@dataclass(frozen=True)
class Difference:
    """`place` is the first that differs (None: none does), by `error` of its largest value, after `equal` places that do not.
    `causes` each make it equal on their own. `logits` is the error at the end; `tried` counts hypotheses."""

    place: str | None
    error: float
    equal: int
    logits: float
    causes: tuple[str, ...] = ()
    tried: int = 0


@torch.no_grad()
def compare(
    model: ModelModule,
    there: Seen,
    tokens: torch.Tensor,
    other: ModelModule | None = None,
    tolerance: float = TOLERANCE,
) -> Difference:
    """Compare a model, float32, with what was seen of another one on the same tokens (B, T) int64.

    `other` is that model where it is one of ours: its settings are then the first explanations that are tried.
    """
    here = observe(model, tokens)
    names = [name for name in here if name in there]
    errors = {name: distance(here[name], there[name]) for name in names}
    logits = errors[LOGITS]
    place = next((name for name in names if errors[name] > tolerance), None)
    if place is None:
        return Difference(None, max(errors.values()), len(names), logits)
    causes, tried = [], 0
    for hypothesis in _hypotheses(model, place, other):
        tried += 1
        if _explains(hypothesis, place, there, tokens, tolerance):
            causes.append(hypothesis.cause)
    return Difference(place, errors[place], names.index(place), logits, tuple(dict.fromkeys(causes)), tried)


def distance(here: torch.Tensor, there: torch.Tensor) -> float:
    """The largest difference, relative to the largest value there; infinite for other sizes or values that are not finite."""
    there = _laid_alike(there, here.shape)
    if here.shape != there.shape:
        return float("inf")
    error = float((here - there).abs().max() / there.abs().max().clamp(min=1e-30))
    return error if error == error else float("inf")


def _laid_alike(there: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A reference may keep heads before time, or rows and time in one axis: the same numbers."""
    if there.dim() == 4 and there.shape != shape and there.transpose(1, 2).shape == shape:
        return there.transpose(1, 2)
    return there.reshape(shape) if there.numel() == shape.numel() else there


def _hypotheses(model: ModelModule, place: str, other: ModelModule | None) -> Iterator[Hypothesis]:
    """What could explain a difference at `place`, the known before the supposed, the near before the far."""
    config, tensors = model.config, dict(model.state_dict())
    if not isinstance(config, Stack):
        return
    index, branch = _where(place)
    scope = () if index is None else ("layers", index)
    if other is not None and isinstance(other.config, Stack) and type(other.config) is type(config):
        yield from known(config, tensors, other.config, dict(other.state_dict()), scope)
    if index is None:
        yield from settings(config, tensors, scope)
        for prefix in ("embed", "norm", "head"):
            yield from moved(config, tensors, prefix)
        return
    for part in ("mixer", "feedforward") if branch is None else (branch,):
        yield from moved(config, tensors, f"layers.{index}.{part}")
        yield from settings(config, tensors, (*scope, part))
    yield from (found for found in settings(config, tensors, scope) if ".parallel " in found.cause)


def _where(place: str) -> tuple[int | None, str | None]:
    """The layer of a place, and its branch; None for the ends of the model, and for the stream between branches."""
    words = place.split(".")
    if words[0] != "layers":
        return None, None
    branch = {"mixer": "mixer", "mlp": "feedforward", "feedforward": "feedforward"}.get(words[2])
    return int(words[1]), branch


def _explains(hypothesis: Hypothesis, place: str, there: Seen, tokens: torch.Tensor, tolerance: float) -> bool:
    """Whether the changed model is equal where the two parted. (Queries and keys may be permuted alike: the scores count.)"""
    index, _ = _where(place)
    changed = _built(hypothesis.config, hypothesis.tensors, None if index is None else index + 1)
    if changed is None:
        return False
    try:
        here = observe(changed, tokens)
    except (RuntimeError, ValueError):  # sizes that do not fit: no explanation
        return False
    after = [place]
    if place.endswith((".mixer.q", ".mixer.k")):
        after.append(place.rpartition(".")[0] + ".pattern")
    return any(name in here and name in there and distance(here[name], there[name]) <= tolerance for name in after)


def _built(config: Model, tensors: Mapping[str, torch.Tensor], layers: int | None) -> ModelModule | None:
    """The module of a value with these tensors, up to the layer that is looked at; None where they do not fit."""
    if layers is not None and isinstance(config, Stack):
        config = config.model_copy(update={"layers": config.layers[:layers]})
    try:
        with torch.device("meta"):
            model = config.module()
    except ValueError:
        return None
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if any(name not in tensors or tuple(tensors[name].shape) != shape for name, shape in wanted.items()):
        return None
    model.load_state_dict({name: tensors[name] for name in wanted}, assign=True)
    return model.eval()


def check_comparable(model: ModelModule, other: ModelModule) -> None:
    """Raise `UserError` for two models that cannot read the same tokens."""
    if model.config.vocab != other.config.vocab:
        raise UserError(
            f"the models have {model.config.vocab} and {other.config.vocab} tokens: they do not read the same text, so there "
            "is nothing to compare"
        )


def windows_seen(model: ModelModule) -> list[int]:
    """The windows of a model's layers, in tokens."""
    if not isinstance(model.config, Stack):
        return []
    masks = (getattr(mixer, "mask", None) for mixer in model.config.mixers())
    return sorted({window for mask in masks if (window := getattr(mask, "window", None)) is not None})
