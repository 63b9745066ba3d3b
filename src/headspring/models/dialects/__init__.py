"""Dialects: the same model as Hugging Face `transformers` writes it down. (GGUF has a room of its own, `gguf/`.)

A dialect is one class in one file of this folder (`registry` says how it is written): a table of reversible rules for the
tensors (`rules`, `moves`) and a reading of the config, each run in both directions. Files register themselves, and no
dialect holds model code: what it describes is a value of `models`.

What a format cannot say is found by saying it and reading it back: a model that does not come back equal is refused, with
the field that got lost. So nothing is dropped in silence, and no list of exceptions is kept.

A file is not trusted. Its config is read first, then the sizes in the header of its weights are compared with what the
config needs, and only then is memory taken, for tensors that the file has.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import torch

from headspring.artifacts.errors import CorruptArtifact, UserError
from headspring.artifacts.files import read_json, write_json
from headspring.models.dialects.losses import distance, losses
from headspring.models.dialects.registry import DIALECTS, Dialect, by_name, of_config
from headspring.models.dialects.rules import check_shapes, complete, to_ours, to_theirs
from headspring.models.dialects.weights import Weights, write
from headspring.models.model import Model, ModelModule

for _module in pkgutil.iter_modules(__path__):
    if not _module.ispkg:
        importlib.import_module(f"{__name__}.{_module.name}")

CONFIG, GENERATION = "config.json", "generation_config.json"
Result = TypeVar("Result")
SHOWN = 3  # fields in an error

__all__ = ["export_huggingface", "expresses", "import_huggingface"]


def import_huggingface(folder: str | Path) -> ModelModule:
    """The model in a `transformers` folder (config.json and safetensors, sharded or not), weights in their stored dtype.

    Raises `UserError` for an architecture, or a setting of one, that our models do not express; `CorruptArtifact` for
    damaged files.
    """
    folder = Path(folder)
    config = _read_config(folder)
    form = _in_folder(folder / CONFIG, lambda: of_config(config))
    weights = Weights(folder)
    names = len(weights.shapes)
    value = _in_folder(folder, lambda: form.read(config, most=names))
    model = _in_folder(folder, lambda: empty(value))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    rules = list(form.rules(value))
    complete(rules, shapes)
    wanted = {name for rule in rules for name in rule.theirs}
    found = _relevant(weights, form, value, wanted)
    check_shapes(rules, shapes, {name: weights.shapes[stored] for name, stored in found.items()}, str(folder))
    tensors = {name: weights.read(found[name]) for name in sorted(wanted)}
    weights.verify({found[name]: tensor for name, tensor in tensors.items()})
    model.load_state_dict(to_ours(rules, tensors, shapes), assign=True)
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not left, f"buffers that no file holds and construction does not compute: {left}"
    return model


def export_huggingface(
    model: ModelModule, folder: str | Path, family: str | None = None, tokens: Mapping[str, Any] | None = None
) -> None:
    """Write config.json and model.safetensors as `transformers` reads them.

    `family` is an architecture (`LlamaForCausalLM`); by default the first that expresses the model. `tokens` may give
    `bos_token_id`, `eos_token_id` and `pad_token_id` (None otherwise: a class default would be another model's token); they
    are also written to generation_config.json, where servers look for what ends an answer.
    Raises `UserError` naming the fields that the format has no words for.
    """
    chosen = _lossless(model.config, DIALECTS if family is None else {family: by_name(family)})
    rules = list(chosen.rules(model.config))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    complete(rules, tensors)
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) | dict(tokens or {})
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    folder = Path(folder)
    write(to_theirs(rules, tensors), folder)
    write_json(folder / CONFIG, {**special, **chosen.write(model.config), "torch_dtype": dtype})
    if given := {name: value for name, value in special.items() if value is not None}:
        write_json(folder / GENERATION, given)


def expresses(model: Model) -> str | None:
    """The architecture of `transformers` that is the same function as `model`, or None."""
    return next((name for name, form in DIALECTS.items() if not losses(form, model)), None)


def empty(model: Model) -> ModelModule:
    """The module without memory for its weights. Raises `UserError` for sizes that do not fit together, or into any memory."""
    try:
        with torch.device("meta"):
            return model.module()
    except (ValueError, RuntimeError) as error:
        raise UserError(f"config.json: {str(error).splitlines()[0]}") from None


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = read_json(folder / CONFIG)
    except OSError as error:
        raise UserError(f"{folder}: no {CONFIG} here, so no model of transformers") from error
    except ValueError as error:
        raise CorruptArtifact(f"{folder / CONFIG}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise CorruptArtifact(f"{folder / CONFIG}: not a model's config")
    return config


def _lossless(model: Model, forms: Mapping[str, Dialect]) -> Dialect:
    """The first dialect that loses nothing. Raises `UserError` with what the nearest one loses."""
    best = min(forms.values(), key=lambda form: distance(form, model))
    lost = losses(best, model)
    if lost:
        more = f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
        fields = "; ".join(lost[:SHOWN]) + more
        raise UserError(f"{best.architecture} cannot express this model: {fields}. Save it in the native format instead")
    return best


def _in_folder(place: Path, function: Callable[[], Result]) -> Result:
    """`function()`, with the place before the message of its `UserError`."""
    try:
        return function()
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def _relevant(weights: Weights, form: Dialect, model: Model, wanted: set[str]) -> dict[str, str]:
    """Names of the tensors that are neither derived nor copies, and what the file calls them.

    A file saved from the bare model lacks the prefix. A copy must equal its original, and takes its place where only the
    copy was saved.
    """
    bare = form.prefix and not any(name.startswith(form.prefix) for name in weights.shapes)
    found: dict[str, str] = {}
    left_out = form.left_out(model)
    for stored in weights.shapes:
        name = form.prefix + stored if bare and stored not in wanted else stored
        if not any(fnmatchcase(name, pattern) for pattern in left_out):
            found[name] = stored
    for copy, original in form.copies(model).items():
        if copy in found and original in found:
            if not weights.equal(found[copy], found[original]):
                raise UserError(f"{weights.folder}: {copy} differs from {original}, though config.json ties them")
            del found[copy]
        elif copy in found:
            found[original] = found.pop(copy)
    weights.check_dtypes(found.values())
    return found
