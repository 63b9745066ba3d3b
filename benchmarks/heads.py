"""What the heads of a decoder know: accuracy by exit layer, and how often drafts are what the model says itself.

    python benchmarks/heads.py [--steps 300]

Bytes of Python's own library, models of 6 layers on one core, the same rows in the same order for each: `plain` next token,
`layer_skip` every layer (arXiv 2404.16710), `ahead` two chained modules (arXiv 2412.19437), `parallel` two parallel ones (arXiv
2404.19737). Measured on files that were not trained on; `repeat` drafts the last byte again, which is what chance gives.
Writes benchmarks/results/heads.json.
"""

import argparse
import json
import sysconfig
import tempfile
from pathlib import Path

import numpy as np
import torch

from headspring.data.batch import Batch
from headspring.data.rows import Rows
from headspring.models import Attention, Block, Decoder, SwiGLU, repeat
from headspring.models.early_exit import exit_after
from headspring.models.heads import Headed, MultiToken
from headspring.models.scoring import cross_entropy_sum
from headspring.training.config import TrainConfig
from headspring.training.heads import Ahead, LayerSkip
from headspring.training.loop import train
from headspring.training.objective import NextToken
from headspring.training.optimizers import AdamW

LENGTH, LAYERS, WIDTH = 64, 6, 64
BLOCK = Block(mixer=Attention(heads=4), feedforward=SwiGLU(hidden=160))
BODY = Decoder(vocab=256, width=WIDTH, layers=repeat(LAYERS, BLOCK), context=LENGTH)


def corpus() -> tuple[list[np.ndarray], torch.Tensor]:
    """Rows of LENGTH + 1 bytes to train on, and rows (200, LENGTH + 1) of every eighth file."""
    learn, test = [], []
    for index, path in enumerate(sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))):
        content = np.frombuffer(path.read_bytes(), dtype=np.uint8)
        cut = content[: len(content) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1).astype(np.int64)
        (test if index % 8 == 0 else learn).extend(cut)
    chosen = np.random.default_rng(0).choice(len(test), 200, replace=False)
    return learn, torch.from_numpy(np.stack([test[i] for i in chosen]))


def join(rows: list[np.ndarray]) -> Batch:
    tokens = torch.from_numpy(np.stack(rows))
    return Batch(tokens[:, :-1], tokens[:, 1:])


@torch.inference_mode()
def by_exit(model, rows: torch.Tensor) -> list[dict]:
    report = []
    for layers in range(1, LAYERS + 1):
        view = exit_after(model, layers)
        hidden = view(rows[:, :-1])
        right = (view.logits(hidden).argmax(-1) == rows[:, 1:]).float().mean()
        bits = float(cross_entropy_sum(view, hidden, rows[:, 1:])) / rows[:, 1:].numel() / np.log(2)
        report.append({"layers": layers, "accuracy": round(float(right), 4), "bits_per_byte": round(bits, 4)})
    return report


@torch.inference_mode()
def drafts(model, rows: torch.Tensor, start: int = 40) -> dict:
    """The share of drafted bytes that the model would write itself, and of drafts that are right up to there."""
    prompt = rows[:, :start]
    drafted, said = model.draft(prompt, model(prompt)), prompt
    for _ in range(drafted.shape[1]):
        said = torch.cat([said, model.logits(model(said)[:, -1:]).argmax(-1)], dim=1)
    same, again = drafted == said[:, start:], said[:, start:] == prompt[:, -1:]
    return {
        "agreement": [round(value, 3) for value in same.float().mean(0).tolist()],
        "accepted_bytes_a_draft": round(float(same.cumprod(1).float().sum(1).mean()), 3),
        "repeat": [round(value, 3) for value in again.float().mean(0).tolist()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    learn, test = corpus()
    chained, parallel = (Headed(body=BODY, heads={"ahead": MultiToken(ahead=2, block=BLOCK, chained=c)}) for c in (True, False))
    runs = {
        "plain": (BODY, NextToken()),
        "layer_skip": (BODY, LayerSkip(dropout=0.1, exit_scale=0.5)),
        "ahead": (chained, Ahead()),
        "parallel": (parallel, Ahead()),
    }
    optimizer = AdamW(learning_rate=0.003, weight_decay=0.01)
    settings = TrainConfig(steps=options.steps, precision="fp32", compile="never", checkpoint_every=10**6, optimizer=optimizer)
    report: dict = {"steps": options.steps, "trained_bytes": options.steps * 16 * LENGTH, "torch": torch.__version__}
    for name, (value, objective) in runs.items():
        model = value.build()
        with tempfile.TemporaryDirectory() as place:
            result = train(model, objective, Rows(learn, join, LENGTH), settings, Path(place))
        report[name] = {"train_seconds": round(result.seconds, 1), "exits": by_exit(model, test)}
        if isinstance(value, Headed):
            report[name]["drafts"] = drafts(model, test)
        print(name, json.dumps(report[name]), flush=True)
    (Path(__file__).parent / "results" / "heads.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
