"""How far back a model remembers, and how its gradients get there: the reason why gates, states and attention were invented.

    python benchmarks/recall.py [--steps 300 --seeds 0 1 2]

*Recall.* A row begins with one of eight values, goes on with noise, and ends with a question: which value was it? Models of
one layer are trained on distances drawn evenly from 1 to 64 and asked at each; chance is 0.125. The size of the memory is
that of the recurrent state (or of a head's keys and values a token).

*Gradients.* How much each of 60 inputs moves the last output of an untrained network whose recurrent matrix is orthogonal
times σ: a simple RNN's gradient is σ^distance (arXiv 1211.5063); a gated network's is not.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).parent
VALUES, NOISE, ASK, FARTHEST = 8, 8, 16, 64
ASKED = (1, 4, 16, 32, 64)
TIME = 60


class Recall:
    """Rows of FARTHEST + 2 tokens: pads of noise, the value, noise, the question. Only the answer carries a loss."""

    sequence_length = FARTHEST + 2

    def __init__(self, seed: int, distance: int | None = None):
        self.seed, self.distance = seed, distance

    def sample(self, index: int) -> Any:
        from headspring.data.batch import IGNORE, Sample

        draw = np.random.default_rng((self.seed, index))
        distance = self.distance or int(draw.integers(1, FARTHEST + 1))
        row = draw.integers(VALUES, VALUES + NOISE, self.sequence_length)
        value = int(draw.integers(VALUES))
        row[-1 - distance], row[-1] = value, ASK
        targets = np.full(self.sequence_length, IGNORE)
        targets[-1] = value
        return Sample(row, targets, np.zeros(self.sequence_length, dtype=np.int32))

    def where(self, document_id: str) -> list:
        return []


def models(size: int) -> dict[str, Any]:
    """One layer of each kind with about `size` numbers to remember in (attention: that many a token)."""
    from headspring.models import GRU, LSTM, RNN, Attention, Block, Branch, Decoder, Mamba2

    mixers = {
        "rnn": RNN(hidden=size), "gru": GRU(hidden=size), "lstm": LSTM(hidden=size // 2),
        "mamba2": Mamba2(head_dim=8, state=max(1, size // 64)),
        "attention": Attention(heads=1, head_dim=size // 2, qk_norm=None),
    }  # fmt: skip
    width = 32
    return {
        name: Decoder(vocab=ASK + 1, width=width, layers=(Block(mixer=Branch(f=mixer)),), context=FARTHEST + 2, tied=False)
        for name, mixer in mixers.items()
    }


def accuracy(model: Any, distance: int, rows: int = 200) -> float:
    """Of answers, at one distance."""
    from headspring.data.batch import collate

    data = Recall(seed=10_000, distance=distance)
    batch = collate([data.sample(index) for index in range(rows)], document_mask=False)
    with torch.no_grad():
        found = model.logits(model(batch.inputs)[:, -1]).argmax(-1)
    return float((found == batch.targets[:, -1]).float().mean())


def recall(config: Any, seed: int, steps: int) -> dict[str, float]:
    """Train one model; its accuracy by distance."""
    from headspring.training.config import TrainConfig
    from headspring.training.loop import train
    from headspring.training.objective import NextToken
    from headspring.training.optimizers import AdamW

    model = config.build(seed)
    settings = TrainConfig(
        steps=steps,
        batch_size=64,
        precision="fp32",
        compile="never",
        optimizer=AdamW(learning_rate=5e-3),
        checkpoint_every=10**6,
    )
    with tempfile.TemporaryDirectory() as folder:
        train(model, NextToken(), Recall(seed), settings, Path(folder), label=f"recall, seed {seed}")
    return {str(distance): accuracy(model.eval(), distance) for distance in ASKED}


def gradients(sigma: float, seed: int = 0) -> dict[str, list[float]]:
    """The size of the gradient of the last output by each input, oldest first, for each kind of network."""
    from headspring.models import GRU, LSTM, RNN, Block, Branch, Decoder

    found = {}
    for name, mixer in {"rnn": RNN, "gru": GRU, "lstm": LSTM}.items():
        block = Block(mixer=Branch(f=mixer(singular_value=sigma), pre=None, residual=False))
        model = Decoder(vocab=3, width=32, layers=(block,), context=TIME, norm=None).build(seed)
        x = (1e-4 * torch.randn(1, TIME, 32, generator=torch.Generator().manual_seed(seed))).requires_grad_()
        with model.sites.edit({"embed": lambda _, x=x: x}):
            last = model(torch.zeros(1, TIME, dtype=torch.int64))[0, -1]
        (gradient,) = torch.autograd.grad(last.square().sum().sqrt(), x)
        found[name] = gradient[0].norm(dim=-1).tolist()
    return found


def draw(result: dict[str, Any], path: Path) -> None:
    """Recall by distance at the left, gradients by distance at the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    colours = dict(zip(("rnn", "gru", "lstm", "mamba2", "attention"), plt.cm.tab10.colors))
    for row in result["recall"]:
        by_distance = np.array([list(seed.values()) for seed in row["accuracy"].values()])
        style = {"color": colours[row["model"]], "linestyle": "-" if row["size"] == max(result["sizes"]) else ":"}
        left.plot(ASKED, by_distance.mean(0), marker="o", label=f"{row['model']}, memory {row['size']}", **style)
    left.set(xscale="log", xlabel="tokens back", ylabel="right answers", xticks=ASKED, xticklabels=ASKED, title="recall")
    left.axhline(1 / VALUES, color="grey", linewidth=0.8)
    left.legend(fontsize=7)
    for sigma, kinds in result["gradients"].items():
        for name, sizes in kinds.items():
            style = {"0.8": ":", "1.0": "-", "1.2": "--"}[sigma]
            right.plot(range(TIME - 1, -1, -1), sizes, style, color=colours[name], label=f"{name}, σ {sigma}")
    right.set(yscale="log", xlabel="tokens back", ylabel="gradient by the input", title="gradients through time")
    right.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "recall.json")
    parser.add_argument("--plot", type=Path, default=HERE.parent / "docs" / "images" / "recall.png")
    options = parser.parse_args()
    from headspring.artifacts.environment import environment

    rows = []
    for size in options.sizes:
        for name, config in models(size).items():
            found = {str(seed): recall(config, seed, options.steps) for seed in options.seeds}
            mean = {distance: np.mean([one[str(distance)] for one in found.values()]) for distance in ASKED}
            print(f"{name:<10} memory {size:<4}", " ".join(f"{d}: {m:.2f}" for d, m in mean.items()), flush=True)
            rows.append({"model": name, "size": size, "accuracy": found})
    result = {
        "environment": environment(), "steps": options.steps, "sizes": options.sizes, "recall": rows,
        "gradients": {str(sigma): gradients(sigma) for sigma in (0.8, 1.0, 1.2)},
    }  # fmt: skip
    options.out.write_text(json.dumps(result, indent=2, default=str) + "\n")
    draw(result, options.plot)


if __name__ == "__main__":
    main()
