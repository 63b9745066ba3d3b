"""The block formats of GGUF as groups of whole numbers, so that a product can read them without unpacking them to floats.

Every format here is scale · value (+ minimum) over 16 or 32 inputs of an output, and only the bytes stand in
another order. The result means exactly what the `gguf` package reads, bit for bit (the products of scales that the K formats
take are rounded to float32 there, too).
"""

import math

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type

from headspring.artifacts.gguf import GgufFile
from headspring.models.quantized import QuantizedMatrix

BLOCKS = (Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q4_K, Type.Q5_K, Type.Q6_K)
ROUTER = "ffn_gate_inp.weight"
# Bytes of a block's head: scales (float16, `d`), minimums (`m`), upper bits (`h`), lower bits (`q`), scales of scales (`s`).
SMALL = {Type.Q8_0: "d", Type.Q4_0: "d", Type.Q4_1: "dm", Type.Q5_0: "dh", Type.Q5_1: "dmh"}


def keeps(file: GgufFile, name: str) -> bool:
    """Whether a tensor is a matrix in blocks, or the matrices of experts; a router's numbers are not multiplied as blocks."""
    info = file.tensors[name]
    return len(info.shape) in (2, 3) and info.type in BLOCKS and not name.endswith(ROUTER)


def read_groups(file: GgufFile, name: str) -> QuantizedMatrix:
    """A tensor in blocks, all but its last dimension as one."""
    info = file.tensors[name]
    outputs, inputs = math.prod(info.shape[:-1]), info.shape[-1]
    blocks = file.content(name).reshape(-1, GGML_QUANT_SIZES[info.type][1])
    with np.errstate(all="ignore"):  # a scale may be any float16, infinity included
        values, scales, minimums = _small(blocks, info.type) if info.type in SMALL else _large(blocks, info.type)
    bits = 4 if info.type in (Type.Q4_0, Type.Q4_1, Type.Q4_K) else 8
    by_output = [None if part is None else torch.from_numpy(part).view(outputs, -1) for part in (scales, minimums)]
    assert by_output[0] is not None
    return QuantizedMatrix(torch.from_numpy(values).view(outputs, inputs), by_output[0], by_output[1], bits)


def _halves(blocks: np.ndarray, start: int) -> np.ndarray:
    """The float16 at byte `start` of every block, as float32 (n,)."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)[:, 0]


def _small(blocks: np.ndarray, type: Type) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Blocks of 32 values and one scale."""
    parts = SMALL[type]
    scales = _halves(blocks, 0)
    minimums = _halves(blocks, 2) if "m" in parts else None
    start = 4 if "m" in parts else 2
    if type is Type.Q8_0:
        return np.ascontiguousarray(blocks[:, start:]).view(np.int8), scales, minimums
    upper = blocks[:, start : start + 4] if "h" in parts else None
    lower = blocks[:, start + (4 if "h" in parts else 0) :]
    values = np.empty((len(blocks), 32), np.uint8)
    np.bitwise_and(lower, 15, out=values[:, :16])
    np.right_shift(lower, 4, out=values[:, 16:])
    if upper is not None:
        values |= np.unpackbits(upper, axis=1, bitorder="little") << 4
    if minimums is None:
        values -= np.uint8(8 if upper is None else 16)  # wraps around, to what int8 says
    return values.view(np.int8), scales, minimums


def _large(blocks: np.ndarray, type: Type) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Blocks of 256 values, whose scales are numbers of a few bits times one float16."""
    if type is Type.Q6_K:
        return _six_bits(blocks)
    scales, minimums = _six_bit_scales(blocks[:, 4:16])
    lower = blocks[:, 48 if type is Type.Q5_K else 16 :].reshape(-1, 4, 32)
    values = np.empty((len(blocks), 4, 2, 32), np.uint8)
    np.bitwise_and(lower, 15, out=values[:, :, 0])
    np.right_shift(lower, 4, out=values[:, :, 1])
    if type is Type.Q5_K:  # bit j of byte i is the fifth bit of value i of part j
        shifts = np.arange(8, dtype=np.uint8).reshape(4, 2, 1)
        values |= (blocks[:, 16:48].reshape(-1, 1, 1, 32) >> shifts & 1) << 4
    whole, offset = _halves(blocks, 0)[:, None], _halves(blocks, 2)[:, None]
    return values.view(np.int8), whole * scales, -(offset * minimums)


def _six_bit_scales(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and minimums (n, 8) float32 of six bits each in 12 bytes: four plain, the upper two bits of the rest above."""
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, (rest & 15) | (first >> 2 & 48)], axis=1)
    minimums = np.concatenate([second & 63, (rest >> 4) | (second >> 2 & 48)], axis=1)
    return scales.astype(np.float32), minimums.astype(np.float32)


def _six_bits(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, None]:
    """Q6_K: of each 128 values, 64 bytes hold lower halves, and 32 bytes two upper bits of four values each."""
    lower = blocks[:, :128].reshape(-1, 2, 2, 32)
    values = np.empty((len(blocks), 2, 4, 32), np.uint8)
    np.bitwise_and(lower, 15, out=values[:, :, :2])
    np.right_shift(lower, 4, out=values[:, :, 2:])
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(4, 1)
    values |= (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3) << 4
    values -= np.uint8(32)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return values.view(np.int8), _halves(blocks, 208)[:, None] * scales, None
