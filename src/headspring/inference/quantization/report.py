"""What a quantized model costs in bytes, and in quality, against the one it was made from.

Both read the same held-out text, with activations in the same dtype. Bits per byte are their own losses; KL(original ‖
quantized) is how far the distribution of the next token has moved, which shows damage that a loss on some text happens to
hide. Then each layer alone:

    error   ‖block_q(x) − block(x)‖ / ‖block(x) − x‖ on the original's stream x: what the layer gets wrong of what it adds
    kl      KL of the outputs where this layer alone is quantized: what that does in the end

A layer's error says where precision is lost, its KL whether that hurts.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import log
from typing import Any

import torch

from headspring.artifacts.progress import task
from headspring.inference.quantization.calibration import enter, leave
from headspring.inference.quantization.installing import installed
from headspring.models import scoring
from headspring.models.around import AroundModule
from headspring.models.kernels.packing import pack_for_serving, unpack_model
from headspring.models.model import ModelModule
from headspring.models.stack import StackModule
from headspring.tokenization.tokenizer import Tokenizer

LAYER_TOKENS = 256  # for the figures of single layers, each of which needs a pass through the layers above it


@dataclass(frozen=True)
class LayerReport:
    layer: int
    error: float
    kl: float


@dataclass(frozen=True)
class Report:
    """Sizes in bytes, scales in float16 as a folder has them (products read float32); `bits` are those of a quantized weight,
    scales included. bits_per_byte and kl (nats a token) are means over `tokens` held-out tokens. `kept` counts the parameters
    that stayed floats."""

    scheme: str
    bits: float
    quantized: int
    kept: int
    bytes: int
    original_bytes: int
    tokens: int
    original_bits_per_byte: float
    bits_per_byte: float
    kl: float
    same_best: float
    layers: tuple[LayerReport, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Baseline:
    """What the original says of held-out text: computed once, for any number of quantized models."""

    @torch.inference_mode()
    def __init__(self, model: ModelModule, tokenizer: Tokenizer, rows: torch.Tensor, dtype: torch.dtype):
        """`rows` (N, T) int64; activations in `dtype`, those of the quantized models."""
        self.model, self.rows, self.dtype = model, rows, dtype
        self.bytes = sum(len(tokenizer.token_bytes(token)) for token in rows[:, 1:].flatten().tolist())
        with _packed(model, dtype), task("reading", len(rows)) as bar:
            self.hidden = [_advanced(bar, model(row[:, :-1])) for row in rows.split(1)]
            self.nats = sum(_nats(model, hidden, row) for hidden, row in zip(self.hidden, rows.split(1)))
            self.best = [model.logits(hidden).argmax(-1) for hidden in self.hidden]
            self.stack = _stack(model)
            if self.stack is not None:  # the streams between its blocks, for the figures of single layers
                x, self.context = enter(self.stack, rows[:1, :LAYER_TOKENS])
                self.streams = [x]
                for block in self.stack.layers:
                    self.streams.append(block(self.streams[-1], self.context))


@torch.inference_mode()
def report(baseline: Baseline, quantized: ModelModule, scheme: str) -> Report:
    """`quantized` against the model of the baseline, both on the CPU."""
    nats, kl, same = 0.0, 0.0, 0
    with _packed(baseline.model, baseline.dtype), task("comparing", len(baseline.rows)) as bar:
        for row, before, best in zip(baseline.rows.split(1), baseline.hidden, baseline.best):
            hidden = _advanced(bar, quantized(row[:, :-1]))
            nats += _nats(quantized, hidden, row)
            kl += float(scoring.divergence(baseline.model, before, quantized, hidden).double().sum())
            same += int((best == quantized.logits(hidden).argmax(-1)).sum())
        layers = tuple(_layers(baseline, quantized))
    count = baseline.rows[:, 1:].numel()
    original, changed = (value / log(2) / max(1, baseline.bytes) for value in (baseline.nats, nats))
    return Report(
        scheme=scheme,
        **sizes(baseline.model, quantized),
        tokens=count,
        original_bits_per_byte=original,
        bits_per_byte=changed,
        kl=kl / count,
        same_best=same / count,
        layers=layers,
    )


@contextmanager
def _packed(model: ModelModule, dtype: torch.dtype) -> Iterator[None]:
    """Inside the block activations are in `dtype`, and the float weights of products are packed once instead of every time."""
    with model.computing_in(dtype):
        pack_for_serving(model)
        try:
            yield
        finally:
            if not model.released:
                unpack_model(model)


def _advanced(bar: Any, hidden: torch.Tensor) -> torch.Tensor:
    bar.advance(1)
    return hidden


def _nats(model: ModelModule, hidden: torch.Tensor, row: torch.Tensor) -> float:
    """What the tokens of a row cost after its first."""
    return -float(scoring.log_probs(model, hidden, row[:, 1:]).double().sum())


def _stack(model: ModelModule) -> StackModule | None:
    """The blocks that text passes through one after the other, where a model is such a stack."""
    inner = model.body if isinstance(model, AroundModule) else model
    return inner if isinstance(inner, StackModule) else None


def sizes(original: ModelModule, quantized: ModelModule) -> dict[str, Any]:
    """bits, quantized, kept, bytes and original_bytes of a `Report`."""
    matrices = installed(quantized)
    stored = {name: matrix.num_bits for name, matrix in matrices.items()}
    numbers = sum(matrix.values.numel() for matrix in matrices.values())
    rest = [parameter for name, parameter in quantized.named_parameters() if name not in matrices]
    kept = sum(parameter.nbytes for parameter in rest)
    return {
        "bits": sum(stored.values()) / numbers if numbers else 8.0 * kept / sum(parameter.numel() for parameter in rest),
        "quantized": numbers,
        "kept": sum(parameter.numel() for parameter in rest),
        "bytes": kept + sum(stored.values()) // 8,
        "original_bytes": sum(parameter.nbytes for parameter in original.parameters()),
    }


def _layers(baseline: Baseline, quantized: ModelModule) -> Iterator[LayerReport]:
    """One report a layer, for models that are a stack of blocks; none for others."""
    first, second, streams = baseline.stack, _stack(quantized), getattr(baseline, "streams", [])
    if first is None or second is None:
        return
    hidden = leave(first, streams[-1])
    with task("single layers", len(first.layers)) as bar:
        for i, block in enumerate(second.layers):
            changed = block(streams[i], baseline.context)
            error = (changed - streams[i + 1]).float().norm() / (streams[i + 1] - streams[i]).float().norm().clamp(min=1e-30)
            for later in first.layers[i + 1 :]:
                changed = later(changed, baseline.context)
            kl = scoring.divergence(baseline.model, hidden, baseline.model, leave(first, changed)).double().mean()
            yield LayerReport(i, float(error), float(kl))
            bar.advance(1)


def as_text(found: Mapping[str, Any], worst: int = 5) -> list[str]:
    """A report, as a dictionary, in lines for a terminal, with its notes; of figures none where nothing was measured."""
    notes = list(found.get("notes", ()))
    if "bits" not in found:
        return notes
    ratio = found["original_bytes"] / found["bytes"]
    lines = [
        f"{found['bits']:.2f} bits a weight, {found['bytes'] / 1e6:,.1f} MB ({ratio:.1f} times less)",
        f"bits per byte {found['original_bits_per_byte']:.4f} → {found['bits_per_byte']:.4f}, "
        f"KL {found['kl']:.4f} nats a token, "
        f"same best token {100 * found['same_best']:.1f} %, over {found['tokens']:,} held-out tokens",
    ]
    if found["layers"]:
        ordered = sorted(found["layers"], key=lambda layer: -layer["kl"])[:worst]
        named = (f"{layer['layer']} (KL {layer['kl']:.4f}, error {100 * layer['error']:.1f} %)" for layer in ordered)
        lines.append(f"the layers that hurt most: {', '.join(named)}")
    return lines + notes
