"""Dialects: the same model as other projects write it down. Now: the Llama line of Hugging Face `transformers`.

A dialect is one table of reversible rules for the tensors (`rules`) and one reading of the config (`llama`), each run in
both directions. What a format cannot say is found by saying it and reading it back: a decoder that does not come back
equal is refused, with the field that got lost. So nothing is dropped in silence, and no list of exceptions is kept.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from headspring.artifacts.errors import CorruptArtifact, UserError
from headspring.artifacts.files import read_json, write_json
from headspring.models.decoder import Decoder, DecoderModule
from headspring.models.dialects.llama import FAMILIES, Family
from headspring.models.dialects.losses import losses
from headspring.models.dialects.rules import check_shapes, complete, expand, to_ours, to_theirs
from headspring.models.dialects.weights import Weights, write

CONFIG = "config.json"
# Buffers that old checkpoints carry and that follow from the config.
DERIVED = (".rotary_emb.inv_freq",)
Result = TypeVar("Result")
SHOWN = 3  # fields in an error

__all__ = ["export_huggingface", "expresses", "import_huggingface"]


def import_huggingface(folder: str | Path) -> DecoderModule:
    """The model in a `transformers` folder (config.json and safetensors, sharded or not), weights in their stored dtype.

    Raises `UserError` for an architecture, or a setting of one, that `Decoder` does not express; `CorruptArtifact` for
    damaged files.
    """
    folder = Path(folder)
    config = _read_config(folder)
    family = _family(config, folder)
    decoder = _in_folder(folder, family.decoder, config)
    model = _in_folder(folder, _empty, decoder)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    rules = list(expand(family.rules(decoder.tied), len(decoder.layers)))
    complete(rules, shapes)
    weights = Weights(folder)
    check_shapes(rules, shapes, _relevant(weights, decoder), str(folder))
    tensors = {rule.theirs: weights.read(rule.theirs) for rule in rules}
    weights.verify(tensors)
    model.load_state_dict(to_ours(rules, tensors, shapes), assign=True)
    return model


def export_huggingface(
    model: DecoderModule, folder: str | Path, family: str | None = None, tokens: Mapping[str, Any] | None = None
) -> None:
    """Write config.json and model.safetensors as `transformers` reads them.

    `family` is an architecture (`LlamaForCausalLM`); by default the first that expresses the model. `tokens` may give
    `bos_token_id`, `eos_token_id` and `pad_token_id` (None otherwise: a class default would be another model's token).
    Raises `UserError` naming the fields that the format has no words for.
    """
    chosen = _lossless(model.config, FAMILIES if family is None else (_by_name(family),))
    rules = list(expand(chosen.rules(model.config.tied), len(model.config.layers)))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    complete(rules, tensors)
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) | dict(tokens or {})
    dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    folder = Path(folder)
    write(to_theirs(rules, tensors), folder)
    write_json(folder / CONFIG, {**chosen.config(model.config), **special, "torch_dtype": dtype})


def expresses(decoder: Decoder) -> str | None:
    """The architecture of `transformers` that is the same function as `decoder`, or None."""
    return next((family.architecture for family in FAMILIES if not losses(family, decoder)), None)


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


def _family(config: Mapping[str, Any], folder: Path) -> Family:
    names = config.get("architectures") or []
    kind = config.get("model_type")
    if names:
        return _in_folder(folder / CONFIG, _by_name, str(names[0]))
    found = {family.model_type: family for family in FAMILIES}
    if kind not in found:
        raise UserError(f"{folder / CONFIG}: model_type {kind!r} is not supported; those that are: {', '.join(found)}")
    return found[kind]


def _by_name(architecture: str) -> Family:
    found = {family.architecture: family for family in FAMILIES}
    if architecture not in found:
        near = difflib.get_close_matches(architecture, found, len(found), cutoff=0.0)
        raise UserError(f"architecture {architecture!r} is not supported; the nearest that are: {', '.join(near)}")
    return found[architecture]


def _empty(decoder: Decoder) -> DecoderModule:
    """The module without memory for its weights."""
    try:
        with torch.device("meta"):
            return DecoderModule(decoder)
    except ValueError as error:
        raise UserError(f"config.json: {error}") from None


def _lossless(decoder: Decoder, families: Sequence[Family]) -> Family:
    """The first family that loses nothing. Raises `UserError` with what the nearest one loses."""
    lost = {family: losses(family, decoder) for family in families}
    best = min(families, key=lambda family: len(lost[family]))
    if lost[best]:
        more = f" and {len(lost[best]) - SHOWN} more" if len(lost[best]) > SHOWN else ""
        fields = "; ".join(lost[best][:SHOWN]) + more
        raise UserError(f"{best.architecture} cannot express this model: {fields}. Save it in the native format instead")
    return best


def _in_folder(folder: Path, function: Callable[[Any], Result], argument: Any) -> Result:
    """`function(argument)`, with the folder's name before the message of its `UserError`."""
    try:
        return function(argument)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def _relevant(weights: Weights, decoder: Decoder) -> dict[str, tuple[int, ...]]:
    """Sizes of the tensors that are not copies: neither derived buffers nor a tied model's second embedding matrix."""
    shapes = {name: shape for name, shape in weights.shapes.items() if not name.endswith(DERIVED)}
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if decoder.tied and embedding in shapes and head in shapes:
        if not torch.equal(weights.read(embedding), weights.read(head)):
            raise UserError(f"{weights.folder}: {head} differs from {embedding}, though config.json ties them")
        del shapes[head]
    return shapes
