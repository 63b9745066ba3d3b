"""Checkpoints: everything a run needs to go on as if it had never stopped, as safetensors, atomic and verified.

    checkpoints/step-000400/state.safetensors   model and optimizer tensors, generator states
    checkpoints/step-000400/state.json          step, scalars, the file's sha256

A checkpoint that fails its hash is named and passed over for the one before it. Never pickle.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from headspring.artifacts.errors import CorruptArtifact
from headspring.artifacts.files import folder_atomic, read_json, sha256_file, write_json
from headspring.models.model import ModelModule

TENSORS, DESCRIPTION = "state.safetensors", "state.json"


@dataclass
class Snapshot:
    """The state of a run after `step` steps. `scalars` is JSON; `tensors` maps names to tensors."""

    step: int
    tensors: dict[str, torch.Tensor]
    scalars: dict[str, Any]


def take(model: ModelModule, optimizers: list[torch.optim.Optimizer], step: int, scalars: dict[str, Any]) -> Snapshot:
    """Collect tensors by name: `model/…`, `optimizer/<parameter>/<slot>`, `generator`."""
    tensors = {f"model/{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for parameter, slots in optimizer.state.items():
            for slot, value in slots.items():
                tensors[f"optimizer/{names[id(parameter)]}/{slot}"] = torch.as_tensor(value)
    tensors["generator"] = torch.get_rng_state()
    return Snapshot(step, tensors, scalars)


def restore(snapshot: Snapshot, model: ModelModule, optimizers: list[torch.optim.Optimizer]) -> None:
    """Put a snapshot's tensors back where `take` found them."""
    prefix = "model/"
    weights = {name[len(prefix) :]: tensor for name, tensor in snapshot.tensors.items() if name.startswith(prefix)}
    model.load_state_dict(weights)
    parameters = dict(model.named_parameters())
    owner = {id(p): optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, tensor in snapshot.tensors.items():
        if name.startswith("optimizer/"):
            parameter_name, slot = name[len("optimizer/") :].rsplit("/", 1)
            parameter = parameters[parameter_name]
            on_device = slot != "step"  # AdamW keeps its step count beside the parameter only where fused on a GPU
            value = tensor.to(parameter.device) if on_device or parameter.device.type == "cuda" else tensor
            owner[id(parameter)].state[parameter][slot] = value.clone()
    torch.set_rng_state(snapshot.tensors["generator"].cpu())


def write(snapshot: Snapshot, folder: Path) -> Path:
    """Write `folder/step-…` in one step and return it."""
    target = Path(folder) / f"step-{snapshot.step:06d}"
    with folder_atomic(target) as temporary:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in snapshot.tensors.items()}
        save_file(_untied(tensors), temporary / TENSORS)
        description = {"step": snapshot.step, "scalars": snapshot.scalars, "sha256": sha256_file(temporary / TENSORS)}
        write_json(temporary / DESCRIPTION, description)
    return target


def _untied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """safetensors refuses tensors that share memory; give each its own."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        shared = tensor.numel() and tensor.data_ptr() in seen
        seen.add(tensor.data_ptr())
        result[name] = tensor.clone() if shared else tensor
    return result


def read(folder: Path) -> Snapshot:
    """Read one checkpoint. Raises `CorruptArtifact`, naming the file, where anything is off."""
    folder = Path(folder)
    try:
        description = read_json(folder / DESCRIPTION)
        if sha256_file(folder / TENSORS) != description["sha256"]:
            raise CorruptArtifact(f"{folder / TENSORS}: content differs from the hash in {DESCRIPTION}")
        return Snapshot(int(description["step"]), load_file(folder / TENSORS), description["scalars"])
    except CorruptArtifact:
        raise
    except Exception as error:
        raise CorruptArtifact(f"{folder}: not a checkpoint ({type(error).__name__}: {error})") from error


def steps(folder: Path) -> list[int]:
    """The steps at which `folder` holds checkpoints, ascending."""
    found = Path(folder).glob("step-*")
    return sorted(int(path.name.removeprefix("step-")) for path in found if path.name[5:].isdigit())


def latest(folder: Path) -> Snapshot | None:
    """The newest checkpoint that is whole; a corrupt one is named in a warning and passed over."""
    for step in reversed(steps(folder)):
        try:
            return read(Path(folder) / f"step-{step:06d}")
        except CorruptArtifact as error:
            warnings.warn(f"{error}; using an older checkpoint", stacklevel=2)
    return None


def prune(folder: Path, keep_last: int, keep_steps: tuple[int, ...]) -> None:
    """Remove all but the newest `keep_last` and those at `keep_steps`."""
    import shutil

    for step in steps(folder)[:-keep_last]:
        if step not in keep_steps:
            shutil.rmtree(Path(folder) / f"step-{step:06d}", ignore_errors=True)
