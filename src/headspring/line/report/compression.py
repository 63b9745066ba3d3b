"""The models as compressors: bits per byte of the same held-out text, beside xz, zstd and an n-gram model."""

import re
from dataclasses import dataclass
from typing import Any

from headspring.line.report.charts import Bar, bars
from headspring.line.report.comparisons import model_label
from headspring.line.report.reading import RunView, lookup, number

BASELINES = (  # pattern of a key in the metrics of `baselines`, label
    (r"kneser_ney_(\d)gram", r"\1-gram (modified Kneser–Ney, same tokens)"),
    (r"xz", "xz −9"),
    (r"zstd", "zstd −19"),
    (r"xz_primed", "xz −9 that has read the training text"),
    (r"zstd_primed", "zstd −19 that has read the training text"),
)


@dataclass(frozen=True)
class Compression:
    """All bars, shortest first, and how the first trained model compares with what had not read the training text."""

    bars: list[Bar]
    model: str
    bits: float
    lost: list[str]  # compressors that need no more bits than the model
    beaten: int
    same_bytes: bool  # False where the two stages measured different held-out text


def compression(run: RunView) -> Compression | None:
    """None where no trained model or no baseline was measured."""
    stages = [stage for stage in run.of_kind("evaluate") if model_label(stage) != "untrained"]
    measured = [(model_label(stage), number(lookup(stage.metrics, "bits_per_byte.all"))) for stage in stages]
    ours = [(name, bits) for name, bits in measured if bits is not None]
    baselines: dict[str, Any] = next((stage.metrics for stage in run.of_kind("baselines")), {})
    peers = [peer for key, value in baselines.items() if (peer := _peer(key, value))]
    if not ours or not peers:
        return None
    rows = [(name, bits, f"{bits:.3f}", True, "") for name, bits in ours]
    rows += [(label, bits, f"{bits:.3f}", False, "") for label, bits, _ in peers]
    name, best = ours[0]
    fair = [(label, bits) for label, bits, primed in peers if not primed]
    lost = [f"{label} ({bits:.3f})" for label, bits in fair if bits <= best]
    measurements = [baselines, *(stage.metrics for stage in stages)]
    texts = {lookup(metrics, "held_out.fingerprint") for metrics in measurements} - {None}
    return Compression(bars(sorted(rows, key=lambda row: row[1])), name, best, lost, len(fair) - len(lost), len(texts) < 2)


def _peer(key: str, value: Any) -> tuple[str, float, bool] | None:
    """(label, bits per byte, whether it read the training text); None for a metric that is no baseline."""
    bits = number(value.get("all")) if isinstance(value, dict) else number(value)
    for pattern, label in BASELINES:
        match = re.fullmatch(pattern, key)
        if match and bits is not None:
            return match.expand(label), bits, key.endswith("_primed")
    return None
