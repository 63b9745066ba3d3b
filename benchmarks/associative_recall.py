"""How many things a model of each kind remembers at once, and how that depends on the size of its memory.

    python benchmarks/associative_recall.py [--steps 1500 --seeds 0 1]

A row shows 1, 2, 4, 8 or 16 pairs of a key and a value, one token a pair, and then asks for each key in another order: which
value? (Multi-query associative recall, arXiv 2312.04927; there a pair is two tokens, so that a model must also learn to join
them, which is a question of layers and not of memory.) Keys and values are of 16 kinds each: chance is 1/16, and 16 pairs are
64 bits. Models of one layer are trained on all numbers of pairs in equal parts and asked for each. The size of a memory is what
the model's own state holds, in numbers: of a whole row, convolutions included; attention's grows with the row.

Writes benchmarks/results/associative_recall.json and docs/images/associative_recall.png.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).parent
KEYS, VALUES = 16, 16
NOTHING = KEYS * VALUES + KEYS  # pairs come first in the vocabulary, then the keys that are asked for
PAIRS = (1, 2, 4, 8, 16)
LENGTH, WIDTH = 2 * max(PAIRS), 32


class Recall:
    """Rows of LENGTH tokens: nothing, the pairs, the questions. Only the answers carry a loss."""

    sequence_length = LENGTH

    def __init__(self, seed: int, pairs: int | None = None):
        self.seed, self.pairs = seed, pairs

    def sample(self, index: int) -> Any:
        from headspring.data.batch import IGNORE, Sample

        draw = np.random.default_rng((self.seed, index))
        pairs = self.pairs or PAIRS[index % len(PAIRS)]
        keys, values = draw.permutation(KEYS)[:pairs], draw.integers(VALUES, size=pairs)
        order = draw.permutation(pairs)
        row, targets = np.full(LENGTH, NOTHING), np.full(LENGTH, IGNORE)
        row[-2 * pairs : -pairs] = keys * VALUES + values
        row[-pairs:] = KEYS * VALUES + keys[order]
        targets[-pairs:] = values[order]
        return Sample(row, targets, np.zeros(LENGTH, dtype=np.int32))

    def where(self, document_id: str) -> list:
        return []


def models(size: int) -> dict[str, Any]:
    """One layer of each kind with about `size` numbers to remember in (attention: so many a token)."""
    from headspring.models import GRU, LSTM, Attention, Block, Branch, Decoder, GatedDelta, LinearAttention, Mamba

    side = round(size**0.5)
    mixers = {
        "lstm": LSTM(hidden=size // 2),
        "gru": GRU(hidden=size),
        "mamba": Mamba(state=max(1, size // WIDTH), expand=1, conv=1),
        "linear_attention": LinearAttention(heads=1, head_dim=side),
        "gated_delta": GatedDelta(heads=1, head_dim=side, conv=1),
        "attention": Attention(heads=1, head_dim=size // 2, qk_norm=None),
    }
    same = {"vocab": NOTHING + 1, "width": WIDTH, "context": LENGTH, "tied": False}
    return {name: Decoder(layers=(Block(mixer=Branch(f=mixer)),), **same) for name, mixer in mixers.items()}


def numbers_remembered(config: Any) -> int:
    """What the state of one row holds at its end."""
    model = config.build()
    cost = model.ledger(LENGTH)
    fixed = model.new_state(1, LENGTH).bytes if cost.fixed_state_bytes else 0.0
    return round(cost.state_bytes * LENGTH / 2 + fixed / 4)


@torch.no_grad()
def accuracy(model: Any, pairs: int, rows: int = 200) -> float:
    """Of all answers of rows that were not trained on."""
    from headspring.data.batch import IGNORE, collate

    data = Recall(seed=10_000, pairs=pairs)
    batch = collate([data.sample(index) for index in range(rows)], document_mask=False)
    asked = batch.targets != IGNORE
    found = model.logits(model(batch.inputs)[asked]).argmax(-1)
    return float((found == batch.targets[asked]).float().mean())


def recall(config: Any, seed: int, steps: int) -> dict[str, float]:
    """Train one model; its accuracy by the number of pairs."""
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
        optimizer=AdamW(learning_rate=1e-2),
        checkpoint_every=10**6,
    )
    with tempfile.TemporaryDirectory() as folder:
        train(model, NextToken(), Recall(seed), settings, Path(folder), label=f"recall, seed {seed}")
    return {str(pairs): accuracy(model.eval(), pairs) for pairs in PAIRS}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel for each kind: right answers by the number of pairs, one line for each size of the memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = plt.subplots(1, len(names), figsize=(2.1 * len(names), 2.8), sharey=True, layout="constrained")
    for name, panel in zip(names, np.atleast_1d(panels)):
        for shade, row in enumerate(row for row in rows if row["model"] == name):
            found = np.array([[seed[str(pairs)] for pairs in PAIRS] for seed in row["accuracy"].values()])
            colour = plt.cm.viridis(0.8 - 0.35 * shade)
            panel.plot(PAIRS, found.mean(0), marker="o", markersize=3, color=colour, label=f"{row['remembered']:,}")
            panel.fill_between(PAIRS, found.min(0), found.max(0), color=colour, alpha=0.2)
        panel.axhline(1 / VALUES, color="grey", linewidth=0.8)
        panel.set(xscale="log", xticks=PAIRS, xticklabels=PAIRS, title=name.replace("_", " "), ylim=(0, 1.03))
        panel.minorticks_off()
        panel.legend(fontsize=6, title="numbers", title_fontsize=6, loc="lower left")
    figure.supxlabel("pairs to remember", fontsize=9)
    np.atleast_1d(panels)[0].set_ylabel("right answers")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--only", nargs="+", help="kinds of models; default: all")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "associative_recall.json")
    parser.add_argument("--plot", type=Path, default=HERE.parent / "docs" / "images" / "associative_recall.png")
    options = parser.parse_args()
    from headspring.artifacts.environment import environment

    torch.set_num_threads(1)
    rows = []
    for size in options.sizes:
        for name, config in models(size).items():
            if options.only and name not in options.only:
                continue
            found = {str(seed): recall(config, seed, options.steps) for seed in options.seeds}
            mean = {pairs: np.mean([one[str(pairs)] for one in found.values()]) for pairs in PAIRS}
            remembered = numbers_remembered(config)
            said = " ".join(f"{pairs}: {share:.2f}" for pairs, share in mean.items())
            print(f"{name:<17} size {size:<4} numbers {remembered:<6} {said}", flush=True)
            rows.append({"model": name, "size": size, "remembered": remembered, "accuracy": found})
    result = {"environment": environment(), "steps": options.steps, "chance": 1 / VALUES, "recall": rows}
    options.out.write_text(json.dumps(result, indent=2, default=str) + "\n")
    draw(rows, options.plot)


if __name__ == "__main__":
    main()
