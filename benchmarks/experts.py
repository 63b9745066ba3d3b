"""Training speed of a mixture of experts against a dense model with the same active parameters, in turns, in one run.

    python benchmarks/experts.py [--width 256 --depth 4 --experts 8 --top 2 --hidden 352 --length 512 --batch 8 --turns 5]

A, B, A, B …: `dense` has a SwiGLU of top · hidden channels; `experts` has `--experts` of `hidden`, each token in `top` of
them, with the balancing losses in its objective. Both in bf16 (or `--precision`) with the same optimizer, batch and threads;
a step is forward, backward, clipping and update. `transformers` is Mixtral's block by its own two implementations, forward and
backward alone, beside ours with the same weights. Reported: tokens/s as the median over turns with the spread.
"""

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from headspring.data.batch import Sample
from headspring.models import Attention, Block, Decoder, MoE, SwiGLU, repeat
from headspring.training import loop
from headspring.training.balancing import balanced
from headspring.training.callbacks import Callback
from headspring.training.config import TrainConfig
from headspring.training.objective import NextToken

HERE = Path(__file__).parent


class Noise:
    """Random tokens: speed does not depend on what they are, but experts do on their being different."""

    def __init__(self, vocab: int, length: int):
        self.vocab, self.sequence_length = vocab, length

    def sample(self, index: int) -> Sample:
        tokens = np.random.default_rng(index).integers(0, self.vocab, self.sequence_length + 1)
        return Sample(tokens[:-1], tokens[1:], np.zeros(self.sequence_length, dtype=np.int32))

    def where(self, document_id: str) -> list:
        return []


class Times(Callback):
    def __init__(self) -> None:
        self.speeds: list[float] = []

    def on_step(self, run, record) -> None:
        self.speeds.append(record["tokens_per_second"])


def model_of(options: argparse.Namespace, feedforward) -> torch.nn.Module:
    block = Block(mixer=Attention(heads=options.width // 64), feedforward=feedforward)
    layers = repeat(options.depth, block)
    return Decoder(vocab=options.vocab, width=options.width, layers=layers, context=options.length).build()


def training_turn(model, options: argparse.Namespace) -> float:
    """Tokens per second of the median step of a turn, without its first two."""
    steps, times = options.steps + 2, Times()
    config = TrainConfig(
        steps=steps, batch_size=options.batch, precision=options.precision, compile="never", checkpoint_every=10**6
    )
    objective, own = balanced(model, NextToken())
    with tempfile.TemporaryDirectory() as folder:
        data = Noise(options.vocab, options.length)
        loop.train(model, objective, data, config, Path(folder), [*own, times])
    return statistics.median(times.speeds[2:])


def block_turn(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, repeats: int) -> float:
    """Tokens per second of forward and backward of one layer, the median of `repeats`."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        layer(x).square().mean().backward()
        seconds.append(time.perf_counter() - started)
    return x.shape[0] * x.shape[1] / statistics.median(seconds[1:])


def blocks(options: argparse.Namespace) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Our layer and Mixtral's in its implementations, all in the same precision."""
    from transformers.models.mixtral import modeling_mixtral as mixtral

    ours = MoE(experts=options.experts, top=options.top, hidden=options.hidden).build(options.width)
    found: dict[str, Callable] = {"headspring": ours}
    for implementation in ("eager", "grouped_mm"):
        config = mixtral.MixtralConfig(
            hidden_size=options.width, intermediate_size=options.hidden, num_local_experts=options.experts,
            num_experts_per_tok=options.top, experts_implementation=implementation,
        )  # fmt: skip
        found[f"transformers-{implementation}"] = mixtral.MixtralSparseMoeBlock(config)
    dtype = loop.DTYPES[options.precision]
    for layer in found.values():
        for parameter in layer.parameters():
            parameter.data = torch.empty_like(parameter, dtype=dtype).normal_(0.0, 0.05)
    return found


def summary(speeds: list[float]) -> dict[str, float]:
    return {"tokens_per_second": statistics.median(speeds), "lowest": min(speeds), "highest": max(speeds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"width": 256, "depth": 4, "experts": 8, "top": 2, "hidden": 352, "length": 512, "batch": 8}
    for name, value in (defaults | {"vocab": 1024, "steps": 6, "turns": 5}).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "experts.json")
    options = parser.parse_args()
    experts = MoE(experts=options.experts, top=options.top, hidden=options.hidden)
    models = {
        "dense": model_of(options, SwiGLU(hidden=options.top * options.hidden)),
        "experts": model_of(options, experts),
    }
    x = torch.randn(options.batch, options.length, options.width).to(loop.DTYPES[options.precision]).requires_grad_()
    layers = blocks(options)
    training: dict[str, list[float]] = {name: [] for name in models}
    alone: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(options.turns):
        for name, model in models.items():
            training[name].append(training_turn(model, options))
        for name, layer in layers.items():
            alone[name].append(block_turn(layer, x, options.steps))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout.strip()
    result = {
        "options": {
            name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items() if name != "out"
        },
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "torch": torch.__version__,
        "commit": commit,
        "active_parameters": {name: model.ledger().active_parameters for name, model in models.items()},
        "parameters": {name: model.num_parameters() for name, model in models.items()},
        "training": {name: summary(speeds) for name, speeds in training.items()},
        "experts_over_dense": statistics.median(a / b for a, b in zip(training["experts"], training["dense"], strict=True)),
        "layer_alone": {name: summary(speeds) for name, speeds in alone.items()},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
