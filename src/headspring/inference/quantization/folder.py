"""A quantized model as a folder: `config.json` and `model.safetensors`, as the native format has them, with whole numbers.

    NAME.values      (O, I) int8, or (O, I / 2) uint8 with input 2i in the lower half of byte i and input 2i + 1 above it
                     (of E experts: E · O rows, one expert's after the other's)
    NAME.scales      (O, G) float16 where that is exact, else float32
    NAME.minimums    the same, where there are minimums
    NAME             a parameter that was not quantized

Why a format of our own, beside those of `transformers`' quantizers: each of those is one scheme with one layout, and several
need its author's package to read. This one says the numbers of any scheme, a GGUF file's included, and reads back bit for bit.
What it gives up: nobody else reads it; for others, `headspring convert` writes Hugging Face's layout or GGUF from the floats.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from headspring.artifacts.errors import CorruptArtifact
from headspring.artifacts.files import read_json, write_atomic, write_json
from headspring.inference.quantization.installing import install, installed
from headspring.models.folder import CONFIG, WEIGHTS
from headspring.models.kernels.packed import GROUP_SIZES
from headspring.models.model import Model, ModelModule
from headspring.models.quantized import SIGNED, QuantizedMatrix

FORMAT = "headspring-quantized"
PARTS = ("values", "scales", "minimums")
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def save_quantized(model: ModelModule, folder: Path, about: Mapping[str, Any] | None = None) -> None:
    """Write a model of whole numbers. `about`: how it was made, kept in config.json."""
    matrices = installed(model)
    assert matrices, "a model of plain weights has a format already"
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items() if name not in matrices}
    for name, matrix in matrices.items():
        tensors |= {f"{name}.{part}": tensor for part, tensor in _stored(matrix).items()}
    content = save({name: tensor.cpu() for name, tensor in tensors.items()}, metadata={"format": "pt"})
    write_atomic(Path(folder) / WEIGHTS, content)
    digest = hashlib.sha256(content).hexdigest()
    described = {"format": FORMAT, "weights_sha256": digest, "dtype": str(model.compute_dtype).removeprefix("torch.")}
    config = model.config.model_dump(mode="json")
    write_json(Path(folder) / CONFIG, {**described, "quantization": dict(about or {}), "model": config})


def is_quantized(folder: Path) -> bool:
    """Whether `folder` holds a model in this format."""
    try:
        return read_json(Path(folder) / CONFIG).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def load_quantized(folder: Path, dtype: torch.dtype | None = None) -> ModelModule:
    """The model, ready to be asked, activations in `dtype` or the one it was saved with. Raises `CorruptArtifact` where weights
    and config do not belong together."""
    described = read_json(Path(folder) / CONFIG)
    try:
        model = Model.choose(described["model"]).module()
        stored = DTYPES[described["dtype"]]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # RuntimeError: sizes that fit into no memory
        raise CorruptArtifact(f"{folder}/{CONFIG}: not a quantized model ({json.dumps(str(error))[:120]})") from error
    tensors = _read(Path(folder), described)
    matrices, plain = _sorted(model, tensors, Path(folder))
    _fill(model, plain, matrices)
    model.compute_dtype = dtype or stored
    install(model, matrices)
    return model


def _fill(model: ModelModule, plain: Mapping[str, torch.Tensor], matrices: Mapping[str, QuantizedMatrix]) -> None:
    """Give an empty model its tensors; a parameter in whole numbers has none."""
    stand_ins = {name: torch.full((1,), torch.nan).expand(model.get_parameter(name).shape) for name in matrices}
    model.load_state_dict({**plain, **stand_ins}, assign=True)


def _read(folder: Path, described: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    try:
        content = (folder / WEIGHTS).read_bytes()
        if hashlib.sha256(content).hexdigest() != described.get("weights_sha256"):
            raise CorruptArtifact(f"{folder / WEIGHTS}: content differs from the hash in {CONFIG}")
        return load(content)
    except (OSError, SafetensorError) as error:
        raise CorruptArtifact(f"{folder / WEIGHTS}: cannot be read ({error})") from error


def _sorted(
    model: ModelModule, tensors: Mapping[str, torch.Tensor], folder: Path
) -> tuple[dict[str, QuantizedMatrix], dict[str, torch.Tensor]]:
    """The matrices, and the plain tensors, that fit the model."""
    plain = dict(tensors)
    matrices = {}
    for name, parameter in model.state_dict().items():
        parts = {part: plain.pop(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in plain}
        matrix = _restored(parts, tuple(parameter.flatten(0, -2).shape)) if parts else None
        if matrix is not None:
            matrices[name] = matrix
        elif parts or name not in plain or plain[name].shape != parameter.shape:
            raise CorruptArtifact(f"{folder / WEIGHTS}: {name} is missing, or does not fit the config")
    if len(plain) + len(matrices) != len(model.state_dict()):
        raise CorruptArtifact(f"{folder / WEIGHTS}: holds tensors that have no place in a model of this config")
    return matrices, plain


def _stored(matrix: QuantizedMatrix) -> dict[str, torch.Tensor]:
    values = matrix.values
    if matrix.bits == 4:
        shifted = (values - (SIGNED[0] if matrix.minimums is None else 0)).view(torch.uint8)
        values = shifted[:, 0::2] | shifted[:, 1::2] << 4
    parts = {"values": values, "scales": _narrow(matrix.scales)}
    return parts if matrix.minimums is None else {**parts, "minimums": _narrow(matrix.minimums)}


def _narrow(numbers: torch.Tensor) -> torch.Tensor:
    half = numbers.to(torch.float16)
    return half if torch.equal(half.float(), numbers) else numbers


def _restored(parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> QuantizedMatrix | None:
    """The inverse of `_stored`, or None where the parts are no matrix of this shape."""
    values, scales, minimums = (parts.get(part) for part in PARTS)
    if values is None or scales is None or scales.dim() != 2 or not scales.is_floating_point():
        return None
    bits = 4 if values.dtype == torch.uint8 else 8
    if bits == 4:
        halves = torch.stack([values & 15, values >> 4], dim=-1).flatten(-2)
        values = halves.view(torch.int8) + (SIGNED[0] if minimums is None else 0)
    group = shape[-1] // max(1, scales.shape[1])
    sizes = (len(values), group * scales.shape[1])
    known = group in GROUP_SIZES or (scales.shape[1] == 1 and bits == 8 and minimums is None)
    fits = values.dtype == torch.int8 and tuple(values.shape) == shape == sizes and len(scales) == len(values) and known
    if not fits or (minimums is not None and minimums.shape != scales.shape):
        return None
    return QuantizedMatrix(values, scales.float(), None if minimums is None else minimums.float(), bits)
