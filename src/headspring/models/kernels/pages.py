"""Calls of the operators on pages (`cpp/paged.cpp`): the structures that they read, as ctypes."""

import ctypes
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from headspring.models.paged import Pages
    from headspring.models.ragged import Ragged


class StepArgument(ctypes.Structure):
    """`Ragged` of cpp/paged.h."""

    _fields_ = [
        ("tables", ctypes.c_void_p),
        ("pages", ctypes.c_int64),
        ("sequences", ctypes.c_int64),
        ("offsets", ctypes.c_void_p),
        ("past", ctypes.c_void_p),
    ]

    @classmethod
    def of(cls, ragged: "Ragged", group: int | None) -> "StepArgument":
        table = ragged.tables[group]
        assert table.dtype == torch.int32 and table.is_contiguous()
        return cls(table.data_ptr(), table.shape[1], table.shape[0], ragged.offsets.data_ptr(), ragged.lengths.data_ptr())


class PagesArgument(ctypes.Structure):
    """`Pages` of cpp/paged.h."""

    _fields_ = [
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("key_scales", ctypes.c_void_p),
        ("value_scales", ctypes.c_void_p),
        ("heads", ctypes.c_int64),
        ("channels", ctypes.c_int64),
    ]

    @classmethod
    def of(cls, pages: "Pages") -> "PagesArgument":
        pointers = [tensor.data_ptr() for tensor in pages.tensors]
        made = cls(*pointers, *[None] * (4 - len(pointers)))
        made.heads, made.channels = pages.keys.shape[1], pages.keys.shape[3]
        return made


class RowsArgument(ctypes.Structure):
    """`Rows` of cpp/paged.h."""

    _fields_ = [("data", ctypes.c_void_p), ("distance", ctypes.c_int64)]

    @classmethod
    def of(cls, x: torch.Tensor) -> "RowsArgument":
        """x (N, heads, C), whose rows may lie apart."""
        assert x.stride(2) == 1 and x.stride(1) == x.shape[2]
        return cls(x.data_ptr(), x.stride(0))


def attend(
    handle: ctypes.CDLL, q: torch.Tensor, pages: "Pages", ragged: "Ragged", window: int | None, scale: float
) -> torch.Tensor:
    """See `kernels.paged_attention`."""
    y = torch.empty(q.shape, dtype=q.dtype)
    step, held, rows, out = (
        StepArgument.of(ragged, pages.group),
        PagesArgument.of(pages),
        RowsArgument.of(q),
        RowsArgument.of(y),
    )
    structures = [ctypes.byref(structure) for structure in (step, held, rows, out)]
    numbers = ctypes.c_int64(q.shape[1]), ctypes.c_int64(window or 0), ctypes.c_float(scale)
    handle.paged_attention(ctypes.c_int(torch.get_num_threads()), *structures, *numbers)
    return y


def write(handle: ctypes.CDLL, k: torch.Tensor, v: torch.Tensor, pages: "Pages", slots: torch.Tensor) -> None:
    """See `kernels.write_pages`."""
    structures = [ctypes.byref(part) for part in (PagesArgument.of(pages), RowsArgument.of(k), RowsArgument.of(v))]
    threads, count = ctypes.c_int(torch.get_num_threads()), ctypes.c_int64(len(slots))
    handle.write_pages(threads, *structures, ctypes.c_void_p(slots.data_ptr()), count)
