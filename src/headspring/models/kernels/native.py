"""Builds and calls the C++ sources in `cpp/`: plain C functions on pointers, through ctypes.

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from headspring.artifacts.environment import processor_name
from headspring.models.kernels import pages as paging

if TYPE_CHECKING:
    from headspring.models.kernels.packed import PackedMatrix
    from headspring.models.paged import Pages
    from headspring.models.ragged import Ragged

FOLDER = Path(__file__).with_name("cpp")
SOURCES, HEADERS = (tuple(sorted(FOLDER.glob(pattern))) for pattern in ("*.cpp", "*.h"))
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
    return _library(os.environ.get("HEADSPRING_KERNELS"))


@functools.cache  # asked for by every operator: not even the names of the build are put together again
def _library(choice: str | None) -> "Library | None":
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
                os.replace(_build(compiler, options, Path(temporary)), path)
        return Library(ctypes.CDLL(str(path)))
    except (OSError, subprocess.SubprocessError):
        return None


def _build(compiler: str, options: tuple[str, ...], folder: Path) -> Path:
    """Compile the sources side by side, and link them."""

    def run(*arguments: object) -> None:
        subprocess.run([compiler, *options, *map(str, arguments)], check=True, capture_output=True, timeout=300)

    objects = [folder / f"{source.stem}.o" for source in SOURCES]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda source, target: run("-c", source, "-o", target), SOURCES, objects))
    run(*objects, "-o", folder / "native.so")
    return folder / "native.so"


def _pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


class Library:
    """One method an operator. Tensors are contiguous, on the CPU, float32 or bfloat16; statistics are float32."""

    def __init__(self, handle: ctypes.CDLL):
        self._handle = handle
        self.has_products = bool(handle.prepare_products())
        self.has_packed_products = self.has_products and hasattr(handle, "packed_product_bf16")
        if self.has_packed_products:
            for product in (handle.packed_product_bf16, handle.packed_product_f32):
                pointer, size = ctypes.c_void_p, ctypes.c_int64
                product.argtypes, product.restype = [ctypes.c_int, pointer, pointer, size, size, pointer, pointer], None

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

    def clamped_multiply(self, gate: torch.Tensor, up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
        """gate and up (N, F), their rows equally far apart."""
        y = torch.empty(gate.shape, dtype=gate.dtype)
        self._call("clamped_multiply", gate.dtype, gate, up, y, *gate.shape, gate.stride(0), alpha, limit)
        return y

    def clamped_multiply_backward(
        self, gradient: torch.Tensor, halves: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], alpha: float, limit: float
    ) -> None:
        """Fills `grads`, which lie in memory as `halves` (gate, up) do."""
        gate = halves[0]
        arguments = (gradient, *halves, *grads, *gate.shape, gate.stride(0), alpha, limit)
        self._call("clamped_multiply_backward", gate.dtype, *arguments)

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
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        first: torch.Tensor | None,
        origin: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """y as q, and the logarithm of each softmax's sum for the backward pass. Tensors as `causal_attention` takes them."""
        batch, heads, time, channels = q.shape
        y = torch.empty(batch, time, heads, channels, dtype=q.dtype).transpose(1, 2)
        log_sums = torch.empty(batch, heads, -(-time // 64) * 64, dtype=torch.float32)
        self._attention("attention", (q, k, v, y), log_sums, first, origin)
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
        self, name: str, tensors: tuple[torch.Tensor, ...], log_sums: torch.Tensor, *places: torch.Tensor | None
    ) -> None:
        """The tensors (B, heads, T, C) go over as a table of addresses and strides; only C must be contiguous."""
        (batch, heads, time, channels), kv_heads = tensors[0].shape, tensors[1].shape[1]
        views = torch.tensor([[x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)] for x in tensors])
        sizes = torch.tensor([batch, heads, kv_heads, time, channels])
        rows = [None if place is None else place.expand(batch, time).contiguous() for place in places]
        pointers = [_pointer(x) for x in (views, log_sums, *rows, sizes)]
        getattr(self._handle, name)(ctypes.c_int(torch.get_num_threads()), *pointers, ctypes.c_float(channels**-0.5))

    def paged_attention(
        self, q: torch.Tensor, pages: "Pages", ragged: "Ragged", window: int | None, scale: float
    ) -> torch.Tensor:
        return paging.attend(self._handle, q, pages, ragged, window, scale)

    def write_pages(self, k: torch.Tensor, v: torch.Tensor, pages: "Pages", slots: torch.Tensor) -> None:
        paging.write(self._handle, k, v, pages, slots)

    def packed_product(
        self, x: torch.Tensor, packed: "PackedMatrix", bias: torch.Tensor | None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x (..., I) times the transposed matrix → (..., O), plus bias (O,), in the dtype of `x`: bfloat16, or float32 with
        an integer kind. Written to `out` (contiguous) where that is given."""
        outputs, inputs = packed.shape
        rows = x if x.is_contiguous() else x.reshape(-1, inputs)
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        y = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype) if out is None else out
        run = self._handle.packed_product_bf16 if x.dtype == torch.bfloat16 else self._handle.packed_product_f32
        distance = inputs if rows.is_contiguous() else rows.stride(0)
        places = y.data_ptr(), None if bias is None else bias.data_ptr()
        run(torch.get_num_threads(), packed.address, rows.data_ptr(), distance, x.numel() // inputs, *places)
        return y

    def router_logits(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x (..., D) · weightᵀ + bias in float32, (..., E). weight (E, D) and bias (E,) float32."""
        y = torch.empty(*x.shape[:-1], len(weight))
        self._call("router_logits", x.dtype, x, weight, bias, y, x.numel() // x.shape[-1], x.shape[-1], len(weight))
        return y

    def combine(self, rows: torch.Tensor, weights: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Σ over k of weights[n, k] · rows[place[n, k]] (N, D), rows (M, D), weights (N, K) float32; place (N, K) int64, -1 for
        none."""
        y = torch.empty(len(place), rows.shape[1], dtype=rows.dtype)
        self._call("combine", rows.dtype, rows, weights, place, y, *place.shape, rows.shape[1])
        return y

    def combine_backward(
        self, gradient: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, place: torch.Tensor, grad_rows: torch.Tensor
    ) -> torch.Tensor:
        """The gradient of `combine`'s weights; that of its rows goes to `grad_rows`, where a token has them."""
        grad_weights, sizes = torch.empty_like(weights), (*place.shape, rows.shape[1])
        self._call("combine_backward", rows.dtype, gradient, rows, weights, place, grad_rows, grad_weights, *sizes)
        return grad_weights

    def pack_words(
        self, words: torch.Tensor, change: int = 0, *, halves: bool = False, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """words (O, W) int32, W a multiple of 16 → panels of 32 rows (⌈O / 32⌉, W, 32), filled up with zeros, every byte ^
        `change`, in `out` where it is given. `halves`: (⌈O / 32⌉, W, 16), the bytes + `change` being of 4 bits, and rows n and
        n + 16 sharing one."""
        rows, width = words.shape
        panels = torch.empty(-(-rows // 32), width, 16 if halves else 32, dtype=torch.int32) if out is None else out
        sizes = ctypes.c_int64(rows), ctypes.c_int64(width), ctypes.c_uint32(change * 0x01010101), ctypes.c_int64(halves)
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
        """In place on matrices of one shape (value, gradient, momentum), float32: see `cpp/muon.cpp`."""
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
