"""A model as a folder: `config.json` (the value tree) and `model.safetensors` (weights under the module's own names)."""

import hashlib
import json
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from headspring.artifacts.errors import CorruptArtifact, UserError
from headspring.artifacts.files import read_json, write_atomic, write_json
from headspring.models.model import Model, ModelModule

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT = "headspring"


def save_model(model: ModelModule, folder: Path) -> None:
    """Write config and weights, atomically. The config records the hash of the weights."""
    if model.released:
        raise UserError("this model's float weights were released when it was packed for serving: load it again to save it")
    folder = Path(folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    content = save(tensors, metadata={"format": "pt"})
    write_atomic(folder / WEIGHTS, content)
    digest = hashlib.sha256(content).hexdigest()
    write_json(folder / CONFIG, {"format": FORMAT, "weights_sha256": digest, "model": model.config.model_dump(mode="json")})


def is_native(folder: Path) -> bool:
    """Whether `folder` holds a model in this format."""
    try:
        return read_json(Path(folder) / CONFIG).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def load_model(folder: Path, device: str | torch.device = "cpu") -> ModelModule:
    """The model of a folder, parameters in the dtype they were saved in.

    Raises `UserError` where there is none, `CorruptArtifact` where weights and config do not belong together.
    """
    folder = Path(folder)
    if not is_native(folder):
        raise UserError(f"{folder}: no Headspring model here ({CONFIG} with format {FORMAT!r} is missing)")
    description = read_json(folder / CONFIG)
    try:
        config = Model.choose(description["model"])
    except (KeyError, ValidationError) as error:
        raise CorruptArtifact(f"{folder / CONFIG}: not a model description ({json.dumps(str(error))[:120]})") from error
    try:
        content_hash = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CorruptArtifact(f"{folder / WEIGHTS}: cannot be read ({error})") from error
    if content_hash != description.get("weights_sha256"):
        raise CorruptArtifact(f"{folder / WEIGHTS}: content differs from the hash in {CONFIG}")
    expected = _shapes(config, folder)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            ours, theirs = (list(each[name]) if name in each else "missing" for each in (expected, found))
            raise CorruptArtifact(f"{folder / WEIGHTS}: {name} is {theirs} in the file and {ours} in the model of {CONFIG}")
    model = config.module()  # which is as large as the file, now that the shapes are the same
    model.load_state_dict(tensors, assign=True)
    return model.to(device)


def _shapes(config: Model, folder: Path) -> dict[str, tuple[int, ...]]:
    """Those that a model's tensors would have, found without memory for them."""
    try:
        with torch.device("meta"):
            return {name: tuple(tensor.shape) for name, tensor in config.module().state_dict().items()}
    except (ValueError, RuntimeError) as error:
        raise CorruptArtifact(f"{folder / CONFIG}: no model has these sizes ({str(error).splitlines()[0][:120]})") from error
