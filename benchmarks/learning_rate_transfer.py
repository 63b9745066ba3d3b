"""Does the best learning rate stay where it is when a model gets wider? Under μP it should; in the standard form it moves.

    python benchmarks/learning_rate_transfer.py [--widths 64 128 256 --steps 100 ...]

A small decoder learns the next byte of Python's standard library with AdamW at every pair of a width and a learning rate
(powers of two), once with `FanIn` and the same rates for all matrices (the standard parametrisation) and once with `mup`
from the smallest width. Reported: the loss of the last fifth of the steps, the best rate of each width, and the factor by
which it moved from the narrowest to the widest. The logits of both are multiplied by `--output`, which like the rate has to
be found at the smallest width: μP carries over what is found there, and a base that learns too slowly too.
"""

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path

import small_corpus

from headspring.models import MLP, Attention, Block, Decoder, FanIn, Head, mup, repeat
from headspring.training.callbacks import Callback, Diverged
from headspring.training.config import TrainConfig
from headspring.training.loop import train
from headspring.training.objective import NextToken
from headspring.training.optimizers import AdamW

HERE = Path(__file__).parent
HEADS = 4


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--rates", type=float, nargs="+", default=[2.0**-i for i in range(10, 4, -1)])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--output", type=float, default=4.0, help="what multiplies the logits of the narrowest model")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "learning_rate_transfer.json")
    return parser.parse_args()


class Losses(Callback):
    """The loss of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step(self, run, record) -> None:
        self.seen.append(record["loss"])


def decoder(arguments: argparse.Namespace, width: int, parametrisation: str) -> Decoder:
    block = Block(mixer=Attention(heads=HEADS, qk_norm=None), feedforward=MLP(hidden=4 * width))
    layers, head = repeat(arguments.depth, block), Head(scale=arguments.output)
    plain = Decoder(vocab=small_corpus.VOCAB, width=width, layers=layers, context=arguments.length, init=FanIn(), head=head)
    base = arguments.widths[0]
    return plain if parametrisation == "standard" else mup(plain, base_width=base, base_head_dim=base // HEADS)


def final_loss(arguments: argparse.Namespace, model: Decoder, rate: float, data) -> float:
    """Mean bits per byte of the last fifth of the steps; infinite where training diverged."""
    optimizer = AdamW(learning_rate=rate, weight_decay=0.0)
    config = TrainConfig(
        steps=arguments.steps, batch_size=arguments.batch, optimizer=optimizer, precision="fp32", compile="never",
        checkpoint_every=10**6, log_every=1,
    )  # fmt: skip
    losses = Losses()
    with tempfile.TemporaryDirectory() as folder:
        try:
            train(model.build(seed=0), NextToken(), data, config, Path(folder), [losses])
        except Diverged:
            return math.inf
    return statistics.mean(losses.seen[-arguments.steps // 5 :]) / math.log(2)


def main() -> None:
    arguments = parse()
    from headspring.artifacts.environment import environment
    from headspring.artifacts.files import write_json

    data, table = small_corpus.Windows(small_corpus.read(held_out=False), arguments.length, seed=0), {}
    for parametrisation in ("standard", "mup"):
        for width in arguments.widths:
            model = decoder(arguments, width, parametrisation)
            row = {rate: round(final_loss(arguments, model, rate, data), 4) for rate in arguments.rates}
            table.setdefault(parametrisation, {})[width] = row
            best = min(row, key=row.get)
            print(
                f"{parametrisation:9} width {width:4}  best {best:.5f}  ", *(f"{loss:.3f}" for loss in row.values()), flush=True
            )
    best = {name: {width: min(row, key=row.get) for width, row in rows.items()} for name, rows in table.items()}
    moved = {name: row[arguments.widths[-1]] / row[arguments.widths[0]] for name, row in best.items()}
    print(json.dumps({"best rate": best, "moved by": moved}, indent=1))
    settings = {key: value for key, value in vars(arguments).items() if key != "out"}
    result = {"settings": settings, "environment": environment(), "bits_per_byte": table, "best_rate": best, "moved_by": moved}
    write_json(arguments.out, json.loads(json.dumps(result).replace("Infinity", "null")))
    print(arguments.out)


if __name__ == "__main__":
    main()
