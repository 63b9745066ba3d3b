"""Numbers as GGUF stores them ↔ torch tensors.

F32, F16 and BF16 are plain numbers and keep their dtype and bits. The others store a row in blocks of 32 or 256 values of
a few bits each, with one scale a block (Q8_0, Q4_0, Q5_0), a scale and a minimum (Q4_1, Q5_1), or a scale of scales (the
K formats); reading one gives float32, exactly the value that the block says.

Blocks are read as whole numbers (`groups`) and multiplied out. The tests hold that against the `gguf` package, which writes
them, and against definitions written one value at a time. What this gives up: unpacked here, a quantized file takes the memory
of floats; `groups` keeps the blocks.
"""

from collections.abc import Sequence

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize

from headspring.artifacts.errors import UserError
from headspring.artifacts.gguf import GgufFile
from headspring.models.dialects.gguf.groups import BLOCKS, ROUTER, read_groups

Type = GGMLQuantizationType
PLAIN = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
# What `pack` writes, by the name a user gives.
WRITTEN: dict[str, Type] = {
    **{str(dtype).removeprefix("torch."): type for type, dtype in PLAIN.items()},
    **{type.name.lower(): type for type in (Type.Q8_0, Type.Q5_1, Type.Q5_0, Type.Q4_1, Type.Q4_0)},
}
# `general.file_type`, what llama.cpp says a file mostly is (enum llama_ftype).
FILE_TYPES = {Type.F32: 0, Type.F16: 1, Type.Q4_0: 2, Type.Q4_1: 3, Type.Q8_0: 7, Type.Q5_0: 8, Type.Q5_1: 9, Type.BF16: 32}


def dtype_of(file: GgufFile) -> torch.dtype:
    """The one plain dtype that all matrices of a file have, or else float32. (Vectors and routers are float32 by custom.)"""
    types = {info.type for name, info in file.tensors.items() if len(info.shape) > 1 and not name.endswith(ROUTER)}
    return PLAIN.get(types.pop(), torch.float32) if len(types) == 1 else torch.float32


def read(file: GgufFile, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A tensor in `dtype`. Raises `UserError` for a format that is not supported."""
    info = file.tensors[name]
    content = file.content(name)
    if info.type in PLAIN:
        plain = torch.from_numpy(content.copy()).view(PLAIN[info.type])
        return plain.reshape(info.shape).to(dtype)
    if info.type not in BLOCKS:
        names = ", ".join(type.name for type in (*PLAIN, *BLOCKS))
        raise UserError(f"{file.path}: the tensor {name!r} is {info.type.name}; those that can be read are {names}")
    return read_groups(file, name).dequantized(dtype).view(info.shape)


def type_for(name: str, shape: Sequence[int], dtype: torch.dtype, wanted: Type | None) -> Type:
    """How a tensor is stored: a matrix as `wanted` (None: in its own dtype), vectors and routers in float32, as llama.cpp does.

    Raises `UserError` where rows are no whole blocks.
    """
    own = {plain: type for type, plain in PLAIN.items()}
    chosen = Type.F32 if len(shape) < 2 or name.endswith(ROUTER) else own.get(dtype, Type.F32) if wanted is None else wanted
    block, kind = GGML_QUANT_SIZES[chosen][0], chosen.name.lower()
    if shape[-1] % block:
        raise UserError(f"{name}: rows of {shape[-1]} values are no whole blocks of {block}, which {kind} needs")
    return chosen


def pack(tensor: torch.Tensor, type: Type) -> np.ndarray:
    """The bytes of a tensor on the CPU, (n,) or (rows, n) uint8."""
    tensor = tensor.contiguous()
    if type in PLAIN:
        return tensor.to(PLAIN[type]).view(torch.uint8).numpy()
    with np.errstate(all="ignore"):  # a block of zeros has the scale 0, by which values are divided
        return quantize(tensor.float().numpy(), type)
