"""What a quantized model costs in bytes, and in quality, against the one it was made from.

Both read the same held-out text. Bits per byte are their own losses; KL(original ‖ quantized) is how far the distribution of
the next token has moved, the measure that sees damage which a loss on some text happens to hide. Then each layer alone:

    error   ‖block_q(x) − block(x)‖ / ‖block(x) − x‖ on the original's stream x: what the layer gets wrong of what it adds
    kl      KL of the outputs where this layer alone is quantized: what that does in the end

A layer's error says where precision is lost, its KL whether that hurts.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import log
from typing import Any

import torch

from headspring.artifacts.progress import task
from headspring.inference.quantization.calibration import enter, leave
from headspring.inference.quantization.installing import installed
from headspring.models import scoring
from headspring.models.around import AroundModule
from headspring.models.model import ModelModule
from headspring.models.stack import StackModule
from headspring.tokenization.tokenizer import Tokenizer

LAYER_TOKENS = 1024  # for the figures of single layers, each of which needs a pass through the layers above it


@dataclass(frozen=True)
class LayerReport:
    layer: int
    error: float
    kl: float


@dataclass(frozen=True)
class Report:
    """Sizes in bytes as they stand in memory; `bits` are those of a quantized weight, scales included. bits_per_byte and kl
    (nats a token) are means over `tokens` held-out tokens. `kept` counts the parameters that stayed floats."""

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


@torch.inference_mode()
def report(original: ModelModule, quantized: ModelModule, tokenizer: Tokenizer, rows: torch.Tensor, scheme: str) -> Report:
    """`rows` (N, T) int64 of held-out text; both models on the CPU."""
    nats, kl, same = torch.zeros(2, dtype=torch.float64), 0.0, 0
    with task("comparing", len(rows)) as bar:
        for row in rows.split(1):
            hidden = [model(row[:, :-1]) for model in (original, quantized)]
            for i, model in enumerate((original, quantized)):
                nats[i] -= scoring.log_probs(model, hidden[i], row[:, 1:]).double().sum()
            kl += float(scoring.divergence(original, hidden[0], quantized, hidden[1]).double().sum())
            best = [model.logits(states).argmax(-1) for model, states in zip((original, quantized), hidden)]
            same += int((best[0] == best[1]).sum())
            bar.advance(1)
    count = rows[:, 1:].numel()
    num_bytes = sum(len(tokenizer.token_bytes(token)) for token in rows[:, 1:].flatten().tolist())
    bits_per_byte = (nats / log(2) / max(1, num_bytes)).tolist()
    return Report(
        scheme=scheme,
        **sizes(original, quantized),
        tokens=count,
        original_bits_per_byte=bits_per_byte[0],
        bits_per_byte=bits_per_byte[1],
        kl=kl / count,
        same_best=same / count,
        layers=tuple(_layers(original, quantized, rows)),
    )


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


def _layers(original: ModelModule, quantized: ModelModule, rows: torch.Tensor) -> list[LayerReport]:
    """One line a layer, for models that are a stack of blocks; none for others."""
    stacks = [model.body if isinstance(model, AroundModule) else model for model in (original, quantized)]
    if not all(isinstance(stack, StackModule) for stack in stacks):
        return []
    rows = rows[: max(1, LAYER_TOKENS // rows.shape[1])]
    first: StackModule = stacks[0]  # type: ignore[assignment]
    x, context = enter(first, rows)
    streams = [x]
    for block in first.layers:
        streams.append(block(streams[-1], context))
    hidden = leave(first, streams[-1])
    reports = []
    with task("single layers", len(first.layers)) as bar:
        for i, block in enumerate(stacks[1].layers):  # type: ignore[arg-type]
            changed = block(streams[i].to(quantized.compute_dtype), context).to(x.dtype)
            error = (changed - streams[i + 1]).float().norm() / (streams[i + 1] - streams[i]).float().norm().clamp(min=1e-30)
            for later in first.layers[i + 1 :]:
                changed = later(changed, context)
            kl = scoring.divergence(original, hidden, original, leave(first, changed)).double().mean()
            reports.append(LayerReport(i, float(error), float(kl)))
            bar.advance(1)
    return reports


def as_text(found: Mapping[str, Any], worst: int = 5) -> list[str]:
    """A report, as a dictionary, in lines for a terminal; none where nothing was measured."""
    if "bits" not in found:
        return []
    ratio = found["original_bytes"] / found["bytes"]
    lines = [
        f"{found['bits']:.2f} bits a weight, {found['bytes'] / 1e6:,.1f} MB in memory ({ratio:.1f} times less)",
        f"bits per byte {found['original_bits_per_byte']:.4f} → {found['bits_per_byte']:.4f}, KL {found['kl']:.4f} nats a token, "
        f"same best token {100 * found['same_best']:.1f} %, over {found['tokens']:,} held-out tokens",
    ]
    if found["layers"]:
        ordered = sorted(found["layers"], key=lambda layer: -layer["kl"])[:worst]
        named = (f"{layer['layer']} (KL {layer['kl']:.4f}, error {100 * layer['error']:.1f} %)" for layer in ordered)
        lines.append(f"the layers that hurt most: {', '.join(named)}")
    return lines
