"""What mixing tokens costs as sequences grow: attention against windows, patterns, choices, and recurrences.

    python benchmarks/attention_cost.py [--lengths 256 512 … 16384] [--only attention window] [--width 128]

One layer, one row, float32, forward and backward, one thread. Every point runs in a process of its own and is measured four
ways: `seconds` of the processor and those of `forward` alone (the median of the passes that fit into the time given, after one
that does not count), `kept` (bytes that the forward pass keeps for the backward pass, each storage once), and `peak` (bytes by
which the process grew at most; Linux only). The table at the end has milliseconds (forward + backward), how many times
faster than `attention` that is, and megabytes kept. The exponent e of cost ~ length^e is the slope through the lengths
from `--fit-from` on, on logarithmic axes.

`pattern` is attention that forms its pattern (an observer looks at it), which the fused kernel of `attention` never does:
its memory is the n² of the textbooks. It stops where a pattern would need more than `--largest` bytes.
"""

import argparse
import math
import multiprocessing
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from headspring.models import (
    Attention,
    Causal,
    GatedDelta,
    Hashed,
    LinearAttention,
    LocalGlobal,
    Mamba2,
    Routed,
    Strided,
)
from headspring.models.context import Context
from headspring.models.mixer import Mixer

HERE = Path(__file__).parent
HEADS = 2
MIXERS: dict[str, Mixer] = {
    "pattern": Attention(heads=HEADS),
    "attention": Attention(heads=HEADS),
    "window": Attention(heads=HEADS, mask=Causal(window=256)),
    "window and sinks": Attention(heads=HEADS, mask=Causal(window=256, sinks=4)),
    "local and global": Attention(heads=HEADS, mask=LocalGlobal(window=128, globals=4, every=256)),
    "strided": Attention(heads=HEADS, mask=Strided(stride=128, local=128)),
    "routed": Attention(heads=HEADS, mask=Routed(block=64, top=4)),
    "hashed": Attention(heads=HEADS, mask=Hashed(block=64, top=4, buckets=16)),
    "linear": LinearAttention(heads=HEADS),
    "gated delta": GatedDelta(heads=HEADS),
    "mamba2": Mamba2(),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--only", nargs="+", choices=MIXERS, default=list(MIXERS))
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=1.0, help="time for the passes of a point")
    parser.add_argument("--fit-from", type=int, default=2048, help="the shortest length that the exponents are fitted to")
    parser.add_argument("--largest", type=float, default=1.5e9, help="bytes of a pattern")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "attention_cost.json")
    parser.add_argument("--plot", type=Path, default=HERE.parent / "docs" / "images" / "attention_cost.png")
    return parser.parse_args()


def memory(field: str) -> int | None:
    """`VmRSS` or `VmHWM` (the peak) of this process, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def measure(name: str, length: int, width: int, seconds: float, pipe: Any) -> None:
    """Runs in a process of its own and sends its four numbers."""
    torch.manual_seed(0)
    module, x = MIXERS[name].build(width), torch.randn(1, length, width, requires_grad=True)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.1)
    if name == "pattern":
        module.watched, module.tap = frozenset(["pattern"]), lambda site, value: value
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def forward() -> torch.Tensor:
        context = Context.of(length, 0, None, None, torch.device("cpu"))
        module.prepare(context)
        return module(x, context).square().mean()

    def once() -> tuple[float, float]:
        """Seconds of both passes, and of the forward pass."""
        start = time.process_time()
        loss = forward()
        between = time.process_time()
        torch.autograd.grad(loss, [x, *module.parameters()])
        return time.process_time() - start, between - start

    before = memory("VmRSS")
    first = once()
    peak, fits = memory("VmHWM"), int(seconds / first[0])
    times = [once() for _ in range(max(1, min(7, fits)))] if first[0] < 4 * seconds else [first]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    grown = None if peak is None or before is None else peak - before
    both, ahead = (statistics.median(part) for part in zip(*times, strict=True))
    pipe.send({"seconds": both, "forward": ahead, "kept": sum(kept.values()), "peak": grown})


def isolated(name: str, length: int, width: int, seconds: float) -> dict[str, float]:
    """`measure` in a new process, so that no point finds memory that another has left."""
    here, there = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=measure, args=(name, length, width, seconds, there))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        raise RuntimeError(f"{name} at {length} tokens did not end well (exit code {process.exitcode})") from None
    finally:
        process.join()


def exponent(row: dict[int, dict[str, float]], what: str, start: int) -> float | None:
    """The least-squares slope of log cost on log length."""
    points = [(math.log(length), math.log(found[what])) for length, found in row.items() if length >= start and found[what]]
    if len(points) < 2:
        return None
    x, y = zip(*points, strict=True)
    return statistics.linear_regression(x, y).slope


def table(rows: dict[str, dict[int, dict[str, float]]]) -> str:
    """A row a mixer, a column a length."""
    full = rows.get("attention", {})

    def cell(length: int, found: dict[str, float] | None) -> str:
        if found is None:
            return ""
        forward, both = 1e3 * found["forward"], 1e3 * found["seconds"]
        faster = f" ({full[length]['seconds'] / found['seconds']:.1f}×)" if length in full else ""
        return f"{forward:.0f} + {both - forward:.0f}{faster}, {found['kept'] / 1e6:.0f} MB"

    lengths = sorted({length for row in rows.values() for length in row})
    lines = [["", *(f"{length:,}" for length in lengths)], ["---"] * (len(lengths) + 1)]
    lines += [[name, *(cell(length, row.get(length)) for length in lengths)] for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(rows: dict[str, dict[int, dict[str, float]]], slopes: dict[str, dict[str, float | None]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 5))
    titles = {"seconds": ("time", "milliseconds", 1e3), "kept": ("memory kept for the backward pass", "megabytes", 1e-6)}
    styles = [(marker, line) for line in ("-", "--") for marker in "osv^DX"]
    for axes, (what, (title, unit, factor)) in zip(panels, titles.items(), strict=True):
        for (name, row), (marker, line) in zip(rows.items(), styles, strict=False):
            slope = slopes[name][what]
            label = name if slope is None else f"{name}: n^{slope:.2f}"
            axes.plot(list(row), [factor * found[what] for found in row.values()], marker=marker, linestyle=line, label=label)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=unit, title=f"{title}, one layer, forward and backward")
        ticks = sorted({length for row in rows.values() for length in row})
        axes.set_xticks(ticks, [str(length) for length in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    panels[1].set_title("memory kept for the backward pass, one layer")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    arguments = parse()
    from headspring.artifacts.environment import environment
    from headspring.artifacts.files import write_json

    load = os.getloadavg()
    rows: dict[str, dict[int, dict[str, float]]] = {name: {} for name in arguments.only}
    for length in arguments.lengths:
        for name in arguments.only:
            if name == "pattern" and 4 * HEADS * length**2 > arguments.largest:
                continue
            rows[name][length] = found = isolated(name, length, arguments.width, arguments.seconds)
            peak = "?" if found["peak"] is None else f"{found['peak'] / 1e6:.0f}"
            print(
                f"{length:6} {name:18} {1e3 * found['seconds']:9.1f} ms  keeps {found['kept'] / 1e6:8.1f} MB, peak {peak} MB",
                flush=True,
            )
    slopes = {
        name: {what: exponent(row, what, arguments.fit_from) for what in ("seconds", "kept", "peak")}
        for name, row in rows.items()
    }
    settings = {key: value for key, value in vars(arguments).items() if key not in ("out", "plot")}
    about = {"settings": settings, "environment": environment(), "load_average": load, "load_average_after": os.getloadavg()}
    mixers = {name: MIXERS[name].model_dump(mode="json") for name in arguments.only}
    write_json(arguments.out, about | {"mixers": mixers, "costs": rows, "exponents": slopes})
    plot(rows, slopes, arguments.plot)
    print(table(rows))
    for name, row in slopes.items():
        print(f"{name:18}", *(f"{what} ~ n^{'?' if slope is None else f'{slope:.2f}'}  " for what, slope in row.items()))


if __name__ == "__main__":
    main()
