"""What stands between a command and its first token, beside the weights themselves."""

import subprocess
import sys

import pytest
import torch

from headspring.inference.quantization.rounding import HALF, round_int4, round_int8
from headspring.models.dialects.moves import Pairs, moved_shapes
from headspring.models.kernels.huge_pages import Room

LOAD = """
import sys
from pathlib import Path
import torch
from headspring.inference import LanguageModel
from headspring.inference.engine import Engine
from headspring.models.dialects.gguf import export_gguf, import_gguf
from headspring.models import Attention, Block, Decoder, RoPE, SwiGLU, repeat

block = Block(mixer=Attention(heads=2, position=RoPE()), feedforward=SwiGLU(hidden=64))
model = Decoder(vocab=64, width=64, layers=repeat(2, block), context=32).build(0)
export_gguf(model, Path(sys.argv[1]), "q8_0")
import_gguf(Path(sys.argv[1]), torch.bfloat16)
print(*(name for name in ("torch._dynamo", "torch._inductor", "sympy", "transformers") if name in sys.modules))
"""


def test_a_model_is_ready_without_torchs_compiler(tmp_path):
    """Its import takes a second, half of what a small model needs to be ready. Operators on shapes alone import it, too."""
    command = [sys.executable, "-c", LOAD, str(tmp_path / "a.gguf")]
    seen = subprocess.run(command, capture_output=True, text=True, check=False)
    assert seen.stdout.split() == [] and seen.returncode == 0, seen.stdout + seen.stderr[-2000:]


@pytest.mark.parametrize("move", [Pairs(4), Pairs(4, rotated=4, skipped=2)])
def test_shapes_move_as_tensors_do(move):
    shape = (32, 8)
    assert moved_shapes(move, [shape]) == [tuple(move.out([torch.zeros(shape)])[0].shape)]


def test_a_room_holds_what_fits_and_nothing_twice():
    room = Room(1 << 12)
    first, second = room.empty((3, 5), torch.float32).fill_(1), room.empty((7,), torch.int8).fill_(2)
    assert room.holds(first) and room.holds(second) and first.data_ptr() % 64 == second.data_ptr() % 64 == 0
    assert (first == 1).all() and (second == 2).all()
    elsewhere = room.empty((1 << 12,), torch.float32)
    assert not room.holds(elsewhere) and room.copied(first) is first
    assert torch.equal(room.copied(torch.arange(4)), torch.arange(4))


@pytest.mark.parametrize("group", [None, 32])
def test_rounding_in_pieces_is_rounding(group, monkeypatch):
    """Against the formula over the whole matrix at once; pieces end inside of it."""
    monkeypatch.setattr("headspring.inference.quantization.rounding.CHUNK", 200)
    weight = torch.randn(37, 96, generator=torch.Generator().manual_seed(0))
    found = round_int8(weight, group)
    rows = weight.unflatten(1, (-1, group or 96))
    scales = rows.abs().amax(dim=2, keepdim=True) / 127.0
    if group:
        scales = (scales * (1 + HALF.eps)).to(torch.float16).float()
    assert torch.equal(found.scales, scales[:, :, 0])
    assert torch.equal(found.values, (rows / scales).round().clamp(-127, 127).to(torch.int8).flatten(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_numbers_mean_the_same_in_pieces(dtype, monkeypatch):
    monkeypatch.setattr("headspring.models.quantized.CHUNK", 200)
    matrix = round_int4(torch.randn(37, 96, generator=torch.Generator().manual_seed(0)), 32, True)
    wide = matrix.values.float().unflatten(1, (-1, 32)) * matrix.scales[:, :, None] + matrix.minimums[:, :, None]
    assert torch.equal(matrix.dequantized(dtype), wide.flatten(1).to(dtype))
