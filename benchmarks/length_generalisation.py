"""What each way of knowing positions does with sequences longer than those of training.

    python benchmarks/length_generalisation.py [--steps 300 --train-length 64 --seeds 1 ...]

Models of one size, alike but for their positions, learn the next byte of Python's standard library from windows of 64
bytes. All are then asked for the *same* held-out bytes, the last 64 of windows of 64, 128, 256 and 512, so that a row of the
table differs in nothing but how much text stands before them: a model that can use it gets better, one that cannot read it
gets worse. Scaled rotations are the trained RoPE model with another `scaling` and no further training; LongRoPE gets the
factors that static NTK scaling would have, as no search was made for it. Loss in bits per byte, with the standard error of
the mean over windows.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import small_corpus
import torch

from headspring.models import (
    ALiBi,
    Attention,
    Block,
    Decoder,
    DynamicNTK,
    Embed,
    Learned,
    Linear,
    Llama3,
    LongRoPE,
    NoPE,
    RoPE,
    Sinusoidal,
    SwiGLU,
    T5Bias,
    YaRN,
    repeat,
)
from headspring.models.scoring import log_probs
from headspring.training.config import TrainConfig
from headspring.training.loop import train
from headspring.training.objective import NextToken

HERE = Path(__file__).parent
HEADS = 4


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--train-length", type=int, default=64)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--windows", type=int, default=128, help="held-out windows")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "length_generalisation.json")
    parser.add_argument("--plot", type=Path, default=HERE.parent / "docs" / "images" / "length_generalisation.png")
    return parser.parse_args()


def trained_values(width: int) -> dict[str, dict]:
    """What differs between the trained models: the position inside attention, or the one added to the embedding (which the
    sinusoids, of size 1, would drown without the paper's √width)."""
    return {
        "none": {"position": NoPE()},
        "learned": {"position": NoPE(), "embed": Embed(positions=Learned())},
        "sinusoidal": {"position": NoPE(), "embed": Embed(scale=width**0.5, positions=Sinusoidal())},
        "T5 bias": {"position": T5Bias(buckets=32, max_distance=128)},
        "ALiBi": {"position": ALiBi()},
        "RoPE": {"position": RoPE()},
    }


def scalings(trained: int, longest: int, head_dim: int) -> dict[str, RoPE]:
    """The trained rotation, stretched from `trained` to `longest` tokens."""
    factor, pairs = longest / trained, head_dim // 2
    slower = tuple(factor ** (i / (pairs - 1)) for i in range(pairs))
    values = {
        "RoPE linear": Linear(factor=factor),
        "RoPE dynamic NTK": DynamicNTK(factor=factor, original_context=trained),
        "RoPE YaRN": YaRN(factor=factor, original_context=trained),
        "RoPE llama3": Llama3(factor=factor, original_context=trained),
        "RoPE LongRoPE": LongRoPE(factor=factor, original_context=trained, short=(1.0,) * pairs, long=slower),
    }
    return {name: RoPE(scaling=scaling) for name, scaling in values.items()}


def decoder(arguments: argparse.Namespace, position, embed: Embed | None = None) -> Decoder:
    attention = Attention(heads=HEADS, position=position)
    block = Block(mixer=attention, feedforward=SwiGLU(hidden=arguments.width * 8 // 3 // 8 * 8))
    return Decoder(
        vocab=small_corpus.VOCAB,
        width=arguments.width,
        layers=repeat(arguments.depth, block),
        context=max(arguments.lengths),
        embed=embed or Embed(),
    )


@torch.no_grad()
def measure(model, held_out: torch.Tensor, arguments: argparse.Namespace) -> dict[int, tuple[float, float]]:
    """Length → bits per byte of the last `train_length` bytes of each window, and its standard error."""
    found, scored = {}, arguments.train_length
    for length in arguments.lengths:
        rows = []
        for windows in held_out[:, -length - 1 :].split(16):
            hidden = model(windows[:, :-1])[:, -scored:]
            rows.append(-log_probs(model, hidden, windows[:, -scored:]).mean(1) / math.log(2))
        bits = torch.cat(rows)
        found[length] = (round(float(bits.mean()), 4), round(float(bits.std() / len(bits) ** 0.5), 4))
    return found


def run(arguments: argparse.Namespace, seed: int, report) -> dict[str, dict[int, tuple[float, float]]]:
    """All models of one seed, trained and measured."""
    text, rest = small_corpus.read(held_out=False), small_corpus.read(held_out=True)
    longest = max(arguments.lengths)
    starts = np.random.default_rng(0).integers(0, len(rest) - longest - 1, arguments.windows)
    held_out = torch.from_numpy(np.stack([rest[start : start + longest + 1] for start in starts]).astype(np.int64))
    config = TrainConfig(steps=arguments.steps, batch_size=arguments.batch, compile="never", checkpoint_every=10**6)
    results = {}
    for name, parts in trained_values(arguments.width).items():
        model = decoder(arguments, **parts).build(seed)
        data = small_corpus.Windows(text, arguments.train_length, seed)
        with tempfile.TemporaryDirectory() as folder:
            train(model, NextToken(), data, config, Path(folder))
        results[name] = report(name, measure(model.eval(), held_out, arguments))
        if name == "RoPE":
            for stretched, position in scalings(arguments.train_length, longest, arguments.width // HEADS).items():
                other = decoder(arguments, position).build()
                other.load_state_dict(model.state_dict())
                results[stretched] = report(stretched, measure(other.eval(), held_out, arguments))
    return results


def plot(rows: dict[str, dict[int, float]], trained: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    rope = {name: row for name, row in rows.items() if name.startswith("RoPE")}
    for axes, chosen, title in ((left, rows.keys() - (rope.keys() - {"RoPE"}), "trained"), (right, rope, "RoPE, stretched")):
        for name in (name for name in rows if name in chosen):
            axes.plot(list(rows[name]), list(rows[name].values()), marker="o", label=name)
        axes.axvline(trained, color="grey", linestyle=":", linewidth=1)
        axes.set(xscale="log", xlabel="bytes in the window", title=title)
        axes.set_xticks(list(rows["RoPE"]), [str(length) for length in rows["RoPE"]])
        axes.minorticks_off()
        axes.legend(fontsize=8, ncol=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    left.set_ylabel(f"bits per byte of the last {trained}")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    arguments = parse()
    from headspring.artifacts.environment import environment
    from headspring.artifacts.files import write_json

    def report(name: str, row: dict[int, tuple[float, float]]) -> dict[int, tuple[float, float]]:
        print(f"{name:18}", *(f"{length}: {bits:.3f} ± {error:.3f}   " for length, (bits, error) in row.items()), flush=True)
        return row

    runs = [run(arguments, seed, report) for seed in range(arguments.seeds)]
    means = {
        name: {length: float(np.mean([one[name][length][0] for one in runs])) for length in arguments.lengths}
        for name in runs[0]
    }
    settings = {key: value for key, value in vars(arguments).items() if key not in ("out", "plot")}
    write_json(arguments.out, {"settings": settings, "environment": environment(), "bits_per_byte": means, "runs": runs})
    plot(means, arguments.train_length, arguments.plot)
    print(json.dumps(means, indent=1))
    print(arguments.out, arguments.plot)


if __name__ == "__main__":
    main()
