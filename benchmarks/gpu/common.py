"""What the scripts for a GPU share: refusing where there is none, timing with its own clock, one JSON file each.

Every script takes `--device cpu --tiny`, which runs the same lines on small sizes in a few seconds and writes no results: so
do the tests keep them alive where there is no GPU.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "results"


def parser(description: str | None, **sizes: tuple[Any, Any]) -> argparse.ArgumentParser:
    """Options for `sizes` (name: the default, and that of `--tiny`), and those that all scripts have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    made.add_argument("--tiny", action="store_true", help="small sizes, few rounds")
    for name, (size, _) in sizes.items():
        made.add_argument(f"--{name}", type=type(size), help=f"default {size}")
    made.set_defaults(sizes=sizes)
    return made


def parse(made: argparse.ArgumentParser) -> tuple[Any, argparse.Namespace]:
    """torch, and the options. One line and exit code 2 where the device is not there."""
    options = made.parse_args()
    for name, both in vars(options).pop("sizes").items():
        if getattr(options, name) is None:
            setattr(options, name, both[options.tiny])
    import torch

    return require_gpu() if options.device == "cuda" else torch, options


def require_gpu() -> Any:
    """torch, where there is a CUDA device; else one line and exit code 2."""
    import torch

    if not torch.cuda.is_available():
        print("this measures a CUDA device, and there is none here; --device cpu --tiny tries the script", file=sys.stderr)
        raise SystemExit(2)
    return torch


def synchronize(device: str) -> None:
    """Wait for what was asked of the device."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(run: Callable[[], Any], device: str = "cuda", rounds: int = 20, warm: int = 5) -> dict[str, float]:
    """Median and spread of one call."""
    for _ in range(warm):
        run()
    times = []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(1000 * (time.perf_counter() - start))
    return {"median_ms": statistics.median(times), "spread_ms": statistics.stdev(times)}


def device_milliseconds(run: Callable[[], Any], options: argparse.Namespace) -> dict[str, float]:
    """The same by the device's own events, without what Python takes to ask for it: for kernels."""
    import torch

    if options.device == "cpu":
        return milliseconds(run, "cpu", *rounds(options))
    count, warm = rounds(options)
    for _ in range(warm):
        run()
    times = []
    for _ in range(count):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return {"median_ms": statistics.median(times), "spread_ms": statistics.stdev(times)}


def rounds(options: argparse.Namespace) -> tuple[int, int]:
    """Timed calls, and calls before them."""
    return (2, 1) if options.tiny else (20, 5)


def bandwidth(options: argparse.Namespace) -> float:
    """Bytes/s that a copy of 2 GiB (16 MiB where tiny) reads and writes together: what decoding is measured against."""
    import torch

    source = torch.empty(2**23 if options.tiny else 2**30, dtype=torch.int16, device=options.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (device_milliseconds(lambda: target.copy_(source), options)["median_ms"] / 1000)


def write(name: str, options: argparse.Namespace | dict[str, Any], results: dict[str, Any]) -> None:
    """results/gpu_NAME.json, with the device and the versions; only shown where the device is none."""
    import torch

    from headspring.artifacts.environment import environment

    settings = options if isinstance(options, dict) else vars(options)
    print(json.dumps(results, indent=2))
    if settings.get("device") == "cpu" or settings.get("tiny"):
        return
    where = environment() | {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    report = {"settings": {key: str(value) for key, value in settings.items()}, "environment": where, **results}
    path = RESULTS / f"gpu_{name}.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(path)
