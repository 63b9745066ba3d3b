"""What the scripts for a GPU share: refusing where there is none, timing with its own clock, one JSON file each."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "results"


def require_gpu() -> Any:
    """torch, where there is a CUDA device; else one line and exit code 1."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("this measures a CUDA device, and there is none here")
    return torch


def milliseconds(run: Callable[[], Any], rounds: int = 20, warm: int = 5) -> dict[str, float]:
    """Median and spread of one call, by the device's events."""
    import torch

    for _ in range(warm):
        run()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return {"median_ms": statistics.median(times), "spread_ms": statistics.stdev(times)}


def bandwidth() -> float:
    """Bytes/s that a copy of 2 GiB reads and writes together: what decoding is measured against."""
    import torch

    source = torch.empty(2**30, dtype=torch.int16, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (milliseconds(lambda: target.copy_(source))["median_ms"] / 1000)


def write(name: str, settings: dict[str, Any], results: dict[str, Any]) -> None:
    """results/gpu_NAME.json, with the device and the versions."""
    import torch

    from headspring.artifacts.environment import environment

    where = environment() | {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    path = RESULTS / f"gpu_{name}.json"
    report = {"settings": {key: str(value) for key, value in settings.items()}, "environment": where, **results}
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2), path, sep="\n")
