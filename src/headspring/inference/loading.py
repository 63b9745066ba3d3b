"""Where a model is: a run, a stage's artifact, a Hugging Face folder or hub name, a GGUF file; and on what it shall run.

A run means its last finished model stage. A stage counts as finished when its manifest is there (it is written last).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headspring.artifacts import UserError
from headspring.artifacts.files import read_json
from headspring.artifacts.manifest import MANIFEST, Manifest, read_manifest
from headspring.inference.quantization.folder import is_quantized, load_quantized
from headspring.models.dialects import import_huggingface
from headspring.models.dialects.gguf import import_gguf
from headspring.models.folder import is_native, load_model
from headspring.models.model import ModelModule

MODEL_KINDS = ("pretrain", "sft", "preference", "contrastive", "multimodal", "quantize")  # in the order of the line
BASE_KINDS = ("pretrain",)  # these have never seen a conversation
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "float": "float32"}
EXPECTED = "a run folder, a stage's folder, a Hugging Face folder, a .gguf file or a hub name such as org/model"


@dataclass(frozen=True)
class Source:
    """What a path or name means: a local folder or file, or (`folder` None) a hub name. `kind`: of the stage, where known."""

    name: str
    folder: Path | None
    kind: str | None = None


def find(path: str | Path) -> Source:
    """Raises `UserError` where there is no model, saying what there is instead."""
    name, folder = str(path), Path(path).expanduser()
    if folder.is_file():
        if not is_gguf(folder):
            raise UserError(f"{name}: is a file; a model is {EXPECTED}")
        return Source(name, folder)
    if folder.is_dir():
        return _find_in(folder, name)
    if looks_like_hub_name(name):
        return Source(name, None)
    raise UserError(f"{name}: no such folder; a model is {EXPECTED}")


def is_gguf(path: Path) -> bool:
    """Whether a path is to be read, or written, as a GGUF file. Its name decides; its content is checked when it is read."""
    return path.suffix == ".gguf"


def read_model(path: Path, dtype: torch.dtype | None) -> ModelModule:
    """The model of a local folder or GGUF file, in `dtype` or the precision it is stored in. A quantized folder's whole numbers
    stay, and `dtype` is that of the activations.

    Raises `UserError` for one that is not supported, `CorruptArtifact` for a damaged one.
    """
    if is_gguf(path):
        return import_gguf(path, dtype)
    if is_quantized(path):
        return load_quantized(path, dtype)
    model = load_model(path) if is_native(path) else import_huggingface(path)
    stored = next(model.parameters(), None)  # an n-gram model has none: its counts keep their precision
    return model if stored is None else model.to(dtype=dtype or stored.dtype)


def looks_like_hub_name(name: str) -> bool:
    """`model` or `org/model`: no path that starts or goes on like one of this machine."""
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "~")) and not Path(parts[0]).exists()


def _find_in(folder: Path, name: str) -> Source:
    if (folder / "config.json").is_file():
        manifest = read_manifest(folder)
        return Source(name, folder, manifest.kind if manifest else None)
    stages = model_stages(folder)
    if stages:
        last, manifest = stages[-1]
        return Source(name, last, manifest.kind)
    if (folder / "run.json").is_file():
        raise UserError(f"{name}: this run has no finished model stage yet; go on with `headspring run`")
    raise UserError(f"{name}: holds no model (no config.json, no finished stage of kind {', '.join(MODEL_KINDS)})")


def model_stages(run: Path) -> list[tuple[Path, Manifest]]:
    """The finished model stages of a run, in the run's order (`run.json`), or else in order of creation."""
    found = []
    for file in run.glob(f"*/{MANIFEST}"):
        if file.parent.name.startswith(".") or not (file.parent / "config.json").is_file():
            continue
        manifest = read_manifest(file.parent)
        if manifest is not None and manifest.kind in MODEL_KINDS:
            found.append((file.parent, manifest))
    order = _stage_order(run)
    if all(folder.name in order for folder, _ in found):
        return sorted(found, key=lambda stage: order.index(stage[0].name))
    return sorted(found, key=lambda stage: stage[1].created)


def _stage_order(run: Path) -> list[str]:
    """Stage names in the order of `run.json`; [] where it is absent or says nothing of them."""
    try:
        stages = read_json(run / "run.json").get("stages", [])
    except (OSError, AttributeError, json.JSONDecodeError):
        return []
    names: list[Any] = [stage.get("name") if isinstance(stage, dict) else stage for stage in stages]
    return [name for name in names if isinstance(name, str)]


def download(name: str, revision: str | None) -> Path:
    """The local snapshot of a hub repository's weights, config and tokenizer; `revision` is a branch, tag or commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}"
        wanted = f"{name} at revision {revision!r}" if revision else name
        raise UserError(f"{wanted}: no such folder here, and the hub gave no model of that name ({reason})") from error


def choose_device(device: str | torch.device) -> torch.device:
    """`auto` is the first CUDA device, or else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"device {device!r} is unknown; use auto, cpu, cuda or cuda:N") from None
    if chosen.type not in ("cpu", "cuda"):
        raise UserError(f"device {device!r} is not supported; use auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {device!r} is not on this machine ({torch.cuda.device_count()} CUDA devices)")
    return chosen


def choose_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """`auto` is None: the precision in which the weights are stored."""
    if dtype == "auto":
        return None
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    name = ALIASES.get(dtype, dtype)
    if name not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; use auto, {', '.join(DTYPES)}")
    return DTYPES[name]
