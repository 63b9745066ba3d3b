"""Builds and calls the C++ sources beside this file: plain C functions on pointers, through ctypes.

Why not `torch.utils.cpp_extension`: it includes torch's headers, takes most of a minute and needs ninja. This takes a few
seconds, needs only `g++` or `clang++`, and the library does not depend on torch's version. Without a compiler, or where
the build fails, `library()` is None and everything runs on the plain versions.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from headspring.artifacts.environment import processor_name
from headspring.models import native_pages

if TYPE_CHECKING:
    from headspring.models.packed import PackedMatrix
    from headspring.models.paged import Pages
    from headspring.models.ragged import Ragged

SOURCES = tuple(
    Path(__file__).with_name(f"{name}.cpp")
    for name in ("native", "native_attention", "native_linear", "native_muon", "native_paged", "native_product", "native_block")
)
HEADERS = tuple(
    Path(__file__).with_name(f"{name}.h")
    for name in ("native_products", "native_softmax", "native_paged", "native_product", "native_product_tiles", "native_rows")
)
# Sums may be reordered, so that they vectorise; NaN and infinity keep their meaning, which -ffast-math would not promise.
FLAGS = (
    *("-O3", "-march=native", "-mprefer-vector-width=512", "-fopenmp", "-fPIC", "-shared", "-std=c++17"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math"),
)


def flags() -> tuple[str, ...]:
    """How the sources are compiled. `HEADSPRING_KERNELS=vector` leaves the processor's matrix unit alone."""
    return (*FLAGS, "-mno-amx-bf16", "-mno-amx-tile") if os.environ.get("HEADSPRING_KERNELS") == "vector" else FLAGS


def digest() -> str:
    """Names the build: sources, flags, processor."""
    return _digest(flags())


@functools.cache
def _digest(options: tuple[str, ...]) -> str:
    machine = f"{processor_name()} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    key = b"".join(path.read_bytes() for path in (*SOURCES, *HEADERS)) + " ".join(options).encode() + machine.encode()
    return hashlib.sha256(key).hexdigest()[:12]


def cache_folder() -> Path:
    """Where builds are kept between runs."""
    base = os.environ.get("HEADSPRING_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "headspring"


def library() -> "Library | None":
    """The built library, or None where it cannot be built here."""
    return _built(digest(), flags())


def enabled() -> "Library | None":
    """The built library, unless `HEADSPRING_KERNELS=plain` turns it off."""
    return None if os.environ.get("HEADSPRING_KERNELS") == "plain" else library()


@functools.cache
def _built(name: str, options: tuple[str, ...]) -> "Library | None":
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None or platform.system() != "Linux":
        return None
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"native-{name}.so"
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                built = Path(temporary) / path.name
                command = [compiler, *options, *map(str, SOURCES), "-o", str(built)]
                subprocess.run(command, check=True, capture_output=True, timeout=120)
                os.replace(built, path)
        return Library(ctypes.CDLL(str(path)))
    except (OSError, subprocess.SubprocessError):
        return None


def _pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


class Library:
    """One method an operator. Tensors are contiguous, on the CPU, float32 or bfloat16; statistics are float32."""

    def __init__(self, handle: ctypes.CDLL):
        self._handle = handle
        self.has_products = bool(handle.prepare_products())
        self.has_packed_products = self.has_products and hasattr(handle, "packed_product_bf16")

    def _call(self, name: str, dtype: torch.dtype, *arguments) -> None:
        suffix = "bf16" if dtype == torch.bfloat16 else "f32"
        converted = [_pointer(a) if a is None or isinstance(a, torch.Tensor) else _scalar(a) for a in arguments]
        getattr(self._handle, f"{name}_{suffix}")(ctypes.c_int(torch.get_num_threads()), *converted)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
        y, rows = torch.empty_like(x), x.numel() // x.shape[-1]
        scale = torch.empty(rows, dtype=torch.float32)
        self._call("rms_norm", x.dtype, x, weight, y, scale, rows, x.shape[-1], epsilon)
        return y, scale

    def add_rms_norm(
        self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, epsilon: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x + y, its norm, and the scale of each row."""
        total, normed, rows = torch.empty_like(x), torch.empty_like(x), x.numel() // x.shape[-1]
        scale = torch.empty(rows, dtype=torch.float32)
        self._call("add_rms_norm", x.dtype, x, y, weight, total, normed, scale, rows, x.shape[-1], epsilon)
        return total, normed, scale

    def rms_norm_backward(
        self,
        gradient: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        passed: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of x (`passed` added to it) and of the weight."""
        grad_x, width = torch.empty_like(x), x.shape[-1]
        partial = torch.zeros(torch.get_num_threads(), width)
        arguments = (gradient, passed, x, weight, scale, grad_x, partial, scale.numel(), width)
        self._call("rms_norm_backward", x.dtype, *arguments)
        return grad_x, partial.sum(0)

    def silu_multiply(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """gate and up (N, F), their rows equally far apart."""
        y = torch.empty(gate.shape, dtype=gate.dtype)
        self._call("silu_multiply", gate.dtype, gate, up, y, *gate.shape, gate.stride(0))
        return y

    def silu_multiply_backward(
        self,
        gradient: torch.Tensor,
        gate: torch.Tensor,
        up: torch.Tensor,
        grad_gate: torch.Tensor,
        grad_up: torch.Tensor,
    ) -> None:
        """Fills grad_gate and grad_up, which lie in memory as gate and up do."""
        arguments = (gradient, gate, up, grad_gate, grad_up, *gate.shape, gate.stride(0))
        self._call("silu_multiply_backward", gate.dtype, *arguments)

    def place_heads(
        self,
        mixed: torch.Tensor,
        gains: torch.Tensor | None,
        cos: torch.Tensor | None,
        sin: torch.Tensor | None,
        heads: int,
        channels: int,
        epsilon: float,
    ) -> torch.Tensor:
        """The first `heads` heads of mixed (B, T, …), normalised and rotated: (B, T, heads, channels)."""
        y = torch.empty(*mixed.shape[:2], heads, channels, dtype=mixed.dtype)
        batch, time = mixed.shape[:2]
        sizes = (batch * time, time, heads, channels, mixed.shape[-1], _row_stride(cos, time))
        self._call("place_heads", mixed.dtype, mixed, gains, cos, sin, y, *sizes, epsilon)
        return y

    def place_heads_backward(
        self,
        grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        mixed: torch.Tensor,
        gains: torch.Tensor | None,
        cos: torch.Tensor | None,
        sin: torch.Tensor | None,
        epsilon: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of `mixed`, and of the gains (heads, channels), from those of queries, keys and values."""
        (batch, time, heads, channels), shared = grads[0].shape, grads[1].shape[2]
        partial, grad_mixed = torch.zeros(torch.get_num_threads(), heads + shared, channels), torch.empty_like(mixed)
        sizes = (batch * time, time, heads, shared, channels, mixed.shape[-1], _row_stride(cos, time))
        self._call("place_heads_backward", mixed.dtype, *grads, mixed, gains, cos, sin, grad_mixed, partial, *sizes, epsilon)
        return grad_mixed, partial.sum(0)

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, inverse: bool) -> torch.Tensor:
        y = torch.empty_like(x)
        batch, time, heads, channels = x.shape
        sizes = (batch, time, heads, channels, _row_stride(cos, time))
        self._call("rotate", x.dtype, x, cos, sin, y, *sizes, int(inverse))
        return y

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """y as q, and the logarithm of each softmax's sum for the backward pass. Tensors as `causal_attention` takes them."""
        batch, heads, time, channels = q.shape
        y = torch.empty(batch, time, heads, channels, dtype=q.dtype).transpose(1, 2)
        log_sums = torch.empty(batch, heads, -(-time // 64) * 64, dtype=torch.float32)
        self._attention("attention", (q, k, v, y), log_sums, first)
        return y, log_sums

    def attention_backward(
        self,
        gradient: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        y: torch.Tensor,
        log_sums: torch.Tensor,
        first: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        """The gradients of q, k and v."""
        grads = tuple(torch.empty(x.transpose(1, 2).shape, dtype=x.dtype).transpose(1, 2) for x in (q, k, v))
        self._attention("attention_backward", (q, k, v, y, gradient, *grads), log_sums, first)
        return grads

    def _attention(
        self, name: str, tensors: tuple[torch.Tensor, ...], log_sums: torch.Tensor, first: torch.Tensor | None
    ) -> None:
        """The tensors (B, heads, T, C) go over as a table of addresses and strides; only C must be contiguous."""
        (batch, heads, time, channels), kv_heads = tensors[0].shape, tensors[1].shape[1]
        views = torch.tensor([[x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)] for x in tensors])
        sizes = torch.tensor([batch, heads, kv_heads, time, channels])
        first = None if first is None else first.expand(batch, time).contiguous()
        pointers = [_pointer(x) for x in (views, log_sums, first, sizes)]
        getattr(self._handle, name)(ctypes.c_int(torch.get_num_threads()), *pointers, ctypes.c_float(channels**-0.5))

    def paged_attention(
        self, q: torch.Tensor, pages: "Pages", ragged: "Ragged", window: int | None, scale: float
    ) -> torch.Tensor:
        return native_pages.attend(self._handle, q, pages, ragged, window, scale)

    def write_pages(self, k: torch.Tensor, v: torch.Tensor, pages: "Pages", slots: torch.Tensor) -> None:
        native_pages.write(self._handle, k, v, pages, slots)

    def packed_product(self, x: torch.Tensor, packed: "PackedMatrix", bias: torch.Tensor | None) -> torch.Tensor:
        """x (N, I) times the transposed matrix → (N, O), plus bias (O,), in the dtype of `x`: bfloat16, or float32 with an
        integer kind. Rows of x may lie apart."""
        y = torch.empty(x.shape[0], packed.shape[0], dtype=x.dtype)
        run = self._handle.packed_product_bf16 if x.dtype == torch.bfloat16 else self._handle.packed_product_f32
        arguments = _pointer(x), ctypes.c_int64(x.stride(0)), ctypes.c_int64(x.shape[0]), _pointer(y), _pointer(bias)
        run(ctypes.c_int(torch.get_num_threads()), ctypes.byref(packed.mirror), *arguments)
        return y

    def pack_words(self, words: torch.Tensor) -> torch.Tensor:
        """words (O, W) int32, W a multiple of 16 → panels of 32 rows (⌈O / 32⌉, W, 32), filled up with zeros."""
        rows, width = words.shape
        panels = torch.empty(-(-rows // 32), width, 32, dtype=torch.int32)
        sizes = ctypes.c_int64(rows), ctypes.c_int64(width)
        self._handle.pack_words(ctypes.c_int(torch.get_num_threads()), _pointer(words), *sizes, _pointer(panels))
        return panels

    def blocks(self, arguments: ctypes.Array, start: int, stop: int, step: ctypes.Structure, x: torch.Tensor) -> None:
        """x (1, N, D) bfloat16 through blocks start … stop − 1, in place: see `fused_block.py`."""
        first = ctypes.byref(arguments, start * ctypes.sizeof(arguments._type_))
        threads, count = ctypes.c_int(torch.get_num_threads()), ctypes.c_int64(stop - start)
        self._handle.blocks(threads, first, count, ctypes.byref(step), _pointer(x))

    def add_weight_gradient(self, gradient: torch.Tensor, x: torch.Tensor, total: torch.Tensor, *, fresh: bool) -> None:
        """total (O, I) float32 += gradientᵀ x, or = where `fresh`. gradient (N, O) and x (N, I) bfloat16, O and I multiples
        of 32; rows may lie apart."""
        sizes = (gradient.stride(0), x.stride(0), x.shape[0], gradient.shape[1], x.shape[1], int(not fresh))
        pointers = [_pointer(tensor) for tensor in (gradient, x, total)]
        self._handle.weight_gradient(ctypes.c_int(torch.get_num_threads()), *pointers, *map(ctypes.c_int64, sizes))

    def muon(
        self,
        matrices: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
        coefficients: tuple[float, float, float],
        steps: int,
        momentum: float,
        keep: float,
        rate: float,
    ) -> None:
        """In place on matrices of one shape (value, gradient, momentum), float32: see `native_muon.cpp`."""
        addresses = torch.tensor([[tensor.data_ptr() for tensor in matrix] for matrix in matrices])
        sizes = map(ctypes.c_int64, (len(matrices), *matrices[0][0].shape, steps))
        pointers = _pointer(addresses), (ctypes.c_float * 3)(*coefficients)
        self._handle.muon(
            ctypes.c_int(torch.get_num_threads()), *pointers, *sizes, *map(ctypes.c_float, (momentum, keep, rate))
        )

    def cross_entropy(self, logits: torch.Tensor, targets: torch.Tensor, scale: float) -> torch.Tensor:
        """−log softmax(logits)[target] (N,) float32; `logits` (N, V) becomes (softmax − one-hot) · scale in place."""
        losses = torch.empty(logits.shape[0], dtype=torch.float32)
        self._call("cross_entropy", logits.dtype, logits, targets, losses, *logits.shape, scale)
        return losses


def _scalar(value: int | float):
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int64(value)


def _row_stride(cos: torch.Tensor | None, time: int) -> int:
    """How many rows of the rotary tables one row of the batch has of its own."""
    return 0 if cos is None or cos.shape[0] == 1 else time
