"""GGUF's blocks as groups of whole numbers: the values that the `gguf` package reads, bit for bit."""

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

from headspring.artifacts.gguf import Entry, GgufFile, write_gguf
from headspring.models.dialects.gguf import blocks
from headspring.models.dialects.gguf.blocks import Type
from headspring.models.dialects.gguf.groups import keeps, read_groups

BITS = {Type.Q4_0: 4, Type.Q4_1: 4, Type.Q4_K: 4}


@pytest.fixture(params=blocks.BLOCKS, ids=lambda type: type.name)
def stored(request, tmp_path) -> tuple[GgufFile, Type]:
    """Random bytes in a format: every pattern of bits is a block, if only its scales are finite."""
    type, shape = request.param, (6, 512)
    size, width = GGML_QUANT_SIZES[type]
    content = np.random.default_rng(0).integers(0, 256, (6 * 512 // size, width), np.uint8)
    scales = np.random.default_rng(1).normal(0, 0.1, (len(content), 2)).astype("<f2").view(np.uint8)
    if type is Type.Q6_K:
        content[:, 208:210] = scales[:, :2]
    else:
        both = 4 if type in (Type.Q4_1, Type.Q5_1, Type.Q4_K, Type.Q5_K) else 2
        content[:, :both] = scales[:, :both]
    write_gguf(tmp_path / "a.gguf", {}, [Entry("w", type, shape, lambda: content)])
    return GgufFile(tmp_path / "a.gguf"), type


def by_the_peer(file: GgufFile) -> torch.Tensor:
    """What the `gguf` package reads."""
    info = file.tensors["w"]
    return torch.from_numpy(dequantize(file.content("w").reshape(info.shape[0], -1), info.type))


def test_the_values_are_those_of_the_blocks(stored):
    file, type = stored
    matrix, unpacked = read_groups(file, "w"), by_the_peer(file)
    assert torch.equal(blocks.read(file, "w", torch.bfloat16), unpacked.to(torch.bfloat16))
    assert keeps(file, "w") and unpacked.isfinite().all()
    assert torch.equal(matrix.dequantized().view(torch.int32), unpacked.view(torch.int32))
    assert matrix.bits == BITS.get(type, 8) and matrix.group == (16 if type is Type.Q6_K else 32)
    low, high = (-128, 127) if matrix.bits == 8 else (-8, 7) if matrix.minimums is None else (0, 15)
    assert low <= matrix.values.min() and matrix.values.max() <= high


def test_another_order_of_the_bytes_would_be_seen(stored):
    file, _ = stored
    matrix, unpacked = read_groups(file, "w"), by_the_peer(file)
    matrix.values[0, [0, 1]] = matrix.values[0, [1, 0]] + 1
    assert not torch.equal(matrix.dequantized(), unpacked)


def test_rows_and_runs_of_outputs_are_those_of_the_whole(stored):
    matrix = read_groups(stored[0], "w")
    whole, chosen = matrix.dequantized(), torch.tensor([[5, 0], [3, 3]])
    assert torch.equal(matrix.rows(chosen), whole[chosen])
    assert torch.equal(torch.cat([part.dequantized() for part in matrix.split([1, 3, 2])]), whole)
