"""Encoder-only, decoder-only and encoder–decoder at equal parameters and equal data on the same three tasks.

    python benchmarks/three_families.py [--steps 200 --seeds 3 | --quick]

Every example is a text with a gap, and what belongs into the gap:

| task | text | gap | measured |
| --- | --- | --- | --- |
| classification | 64 bytes of a module of Python's standard library | behind it: which of four packages it is from | accuracy |
| infilling | 64 bytes of the library | 6 bytes in their middle | accuracy per byte |
| transformation | a `snake_case` name of the library | behind it: the name in `CamelCase` | names without a mistake |

An encoder reads the text with as many masks in the gap as the answer has bytes, and fills them all at once. A decoder reads
the text, a mark in the place of the gap, and writes the answer behind it. An encoder–decoder does the same with the text as
its source. Files and names of the test are never trained on. Each number is the mean over seeds (of the weights and of the
order of examples) with the half width of its 95 % t-interval.

Each cell is written when it is done; run again with the same settings, an interrupted run goes on.

What it cannot say: who wins at another size. At this one, models differ by what their form makes easy to find in few steps.
"""

import argparse
import itertools
import json
import re
import statistics
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from headspring.data.batch import IGNORE, Sample, Visit
from headspring.models import Attention, Block, CrossAttention, Decoder, Encoder, EncoderDecoder, Full, SwiGLU, repeat
from headspring.models.model import Model, ModelModule
from headspring.training.config import TrainConfig
from headspring.training.loop import train
from headspring.training.masked import MaskedTokens
from headspring.training.objective import NextToken
from headspring.training.optimizers import Muon
from headspring.training.schedule import Cosine

HERE = Path(__file__).parent
PAD, MASK, GAP, START = 256, 257, 258, 259
VOCAB, CONTEXT = 260, 96
PACKAGES = ("asyncio", "email", "tkinter", "encodings")
WINDOW, MISSING, LONGEST = 64, 6, 20
NOT_READ = {"test", "tests", "idlelib", "pydoc_data", "site-packages", "dist-packages"}
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # of the t-distribution with n − 1 degrees of freedom
FAMILIES = ("encoder", "decoder", "encoder–decoder")


@dataclass(frozen=True)
class Example:
    """`before` GAP `after`, and the answer that belongs there."""

    before: list[int]
    after: list[int]
    answer: list[int]


# ---- the tasks: generator, whether the example is for the test → example


def library(held_out: bool, folder: str = "") -> list[bytes]:
    """The modules of the standard library (or of one of its packages), every fifth of them for the test."""
    files = sorted((Path(sysconfig.get_paths()["stdlib"]) / folder).rglob("*.py"))
    files = [file for file in files if not NOT_READ & set(file.parts)]
    modules = [file.read_bytes() for index, file in enumerate(files) if (index % 5 == 0) == held_out]
    return [module for module in modules if len(module) > 4 * WINDOW]


class Classification:
    """Which package is this from?"""

    def __init__(self, held_out: bool):
        self.packages = [np.frombuffer(b"".join(library(held_out, name)), np.uint8) for name in PACKAGES]

    def example(self, draw: np.random.Generator) -> Example:
        label = int(draw.integers(len(PACKAGES)))
        start = draw.integers(len(self.packages[label]) - WINDOW)
        return Example(self.packages[label][start : start + WINDOW].tolist(), [], [ord("A") + label])


class Infilling:
    """What stood here?"""

    def __init__(self, held_out: bool):
        modules = [module for module in library(held_out) if b"decoding_table" not in module]  # pages of one and the same line
        self.text = np.frombuffer(b"".join(modules), np.uint8)

    def example(self, draw: np.random.Generator) -> Example:
        start, half = draw.integers(len(self.text) - WINDOW), (WINDOW - MISSING) // 2
        window = self.text[start : start + WINDOW].tolist()
        return Example(window[:half], window[half + MISSING :], window[half : half + MISSING])


class Transformation:
    """`snake_case` → `SnakeCase`, both filled up with pads."""

    def __init__(self, held_out: bool):
        found = set(re.findall(rb"\b[a-z]+(?:_[a-z]+)+\b", b"\n".join(library(True) + library(False))))
        names = sorted(name for name in found if len(name) <= LONGEST)
        self.names = [name for index, name in enumerate(names) if (index % 5 == 0) == held_out]

    def example(self, draw: np.random.Generator) -> Example:
        name = self.names[draw.integers(len(self.names))]
        camel = b"".join(part.capitalize() for part in name.split(b"_"))
        return Example(_filled(name), [], _filled(camel))


def _filled(text: bytes) -> list[int]:
    return [*text, *[PAD] * (LONGEST - len(text))]


TASKS = {"classification": Classification, "infilling": Infilling, "transformation": Transformation}
WHOLE = {"transformation"}  # counted only where all of the answer is right


# ---- one example, three ways to read it


class Rows:
    """The examples of a task as a family reads them: a pure function of (seed, index)."""

    def __init__(self, task, family: str, seed: int):
        self.task, self.family, self.seed = task, family, seed
        self.sequence_length = len(self.sample(0).inputs)

    def example(self, index: int) -> Example:
        return self.task.example(np.random.default_rng((self.seed, index)))

    def sample(self, index: int) -> Sample:
        one = self.example(index)
        text, count, source = [*one.before, GAP, *one.after], len(one.answer), None
        if self.family == "encoder":
            inputs = [*one.before, *[MASK] * count, *one.after]
            targets = [*[IGNORE] * len(one.before), *one.answer, *[IGNORE] * len(one.after)]
        else:
            inputs, targets = [START, *one.answer[:-1]], one.answer
            if self.family == "decoder":
                inputs, targets = text + inputs, [IGNORE] * len(text) + targets
            else:
                source = np.array(text)
        return Sample(np.array(inputs), np.array(targets), np.zeros(len(inputs), np.int32), source)

    def where(self, document_id: str) -> list[Visit]:
        return []


@torch.inference_mode()
def answers(model: ModelModule, examples: list[Example], family: str) -> torch.Tensor:
    """What the model puts into the gaps, its best guess at each step: (B, A)."""
    count = len(examples[0].answer)
    if family == "encoder":
        rows = torch.tensor([[*one.before, *[MASK] * count, *one.after] for one in examples])
        first = len(examples[0].before)
        return model.logits(model(rows)[:, first : first + count]).argmax(-1)
    text = torch.tensor([[*one.before, GAP, *one.after] for one in examples])
    new, state, found = torch.full((len(examples), 1), START), model.new_state(len(examples)), []
    given = {"source": text} if family == "encoder–decoder" else {}
    if family == "decoder":
        new = torch.cat([text, new], dim=1)
    for _ in range(count):
        new = model.logits(model(new, state=state, **given)[:, -1:]).argmax(-1)
        found.append(new)
        given = {}
    return torch.cat(found, dim=1)


def score(model: ModelModule, rows: Rows, task: str, count: int) -> float:
    """The share of right answers, or of right bytes in them, over the test's first `count` examples."""
    right = []
    for start in range(0, count, 256):
        examples = [rows.example(index) for index in range(start, min(start + 256, count))]
        hit = answers(model, examples, rows.family) == torch.tensor([one.answer for one in examples])
        right.append((hit.all(1) if task in WHOLE else hit).flatten().float())
    return float(torch.cat(right).mean())


# ---- the models


def described(family: str, width: int, depth: int, hidden: int) -> Model:
    """`depth` layers in all; half of them on each side of an encoder–decoder."""
    sizes, feedforward = {"vocab": VOCAB, "width": width, "context": CONTEXT}, SwiGLU(hidden=hidden)
    reads = Block(mixer=Attention(heads=4, mask=Full()), feedforward=feedforward)
    if family == "encoder":
        return Encoder(**sizes, layers=repeat(depth, reads))
    if family == "decoder":
        return Decoder(**sizes, layers=repeat(depth, Block(mixer=Attention(heads=4), feedforward=feedforward)))
    writes = Block(mixer=Attention(heads=4), cross=CrossAttention(heads=4), feedforward=feedforward)
    return EncoderDecoder(
        encoder=Encoder(**sizes, layers=repeat(depth // 2, reads), head=None),
        decoder=Decoder(**sizes, layers=repeat(depth // 2, writes)),
        start=START,
    )


def equal(width: int, depth: int) -> dict[str, Model]:
    """The three of one size: the feed-forward parts of the encoder–decoder pay for its cross-attention."""
    hidden = width * 8 // 3
    models = {family: described(family, width, depth, hidden) for family in ("encoder", "decoder")}
    wanted = models["decoder"].build().num_parameters()
    sizes = {h: described("encoder–decoder", width, depth, h).build().num_parameters() for h in range(hidden // 2, hidden)}
    closest = min(sizes, key=lambda h: abs(sizes[h] - wanted))
    return models | {"encoder–decoder": described("encoder–decoder", width, depth, closest)}


def run(value: Model, family: str, task: str, seed: int, arguments: argparse.Namespace) -> tuple[float, float]:
    """The score of one model, and the seconds of its training."""
    model = value.build(seed)
    config = TrainConfig(
        steps=arguments.steps,
        batch_size=arguments.batch,
        precision="fp32",
        compile="never",
        optimizer=Muon(),
        schedule=Cosine(warmup_steps=max(1, arguments.steps // 10)),
    )
    objective = MaskedTokens() if family == "encoder" else NextToken()
    with tempfile.TemporaryDirectory() as place:
        started = time.perf_counter()
        train(model, objective, Rows(TASKS[task](held_out=False), family, seed), config, Path(place))
        seconds = time.perf_counter() - started
    return score(model, Rows(TASKS[task](held_out=True), family, seed=10**6), task, arguments.test), seconds


def interval(values: list[float]) -> tuple[float, float | None]:
    """Mean, and the half width of its 95 % interval; None for a single value."""
    if len(values) < 2:
        return statistics.mean(values), None
    return statistics.mean(values), T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 6))
    parser.add_argument("--test", type=int, default=1024, help="examples of the test")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--quick", action="store_true", help="one seed, narrow models, a few steps: only to see that it runs")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "three_families.json")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.seeds, arguments.width, arguments.test, arguments.batch = 6, 1, 32, 64, 8
    return arguments


def kept(path: Path, settings: dict) -> list[dict]:
    """The rows that an interrupted run with the same settings has left."""
    found = json.loads(path.read_text()) if path.exists() else {}
    return found["rows"] if found.get("settings") == settings else []


def main() -> None:
    arguments = parse()
    models = equal(arguments.width, arguments.depth)
    parameters = {family: value.build().num_parameters() for family, value in models.items()}
    settings = {name: value for name, value in vars(arguments).items() if name not in ("out", "tasks")}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    rows = kept(arguments.out, settings)
    done = {(row["task"], row["family"]) for row in rows}
    for task, family in itertools.product(arguments.tasks, models):
        if (task, family) in done:
            continue
        found = [run(models[family], family, task, seed, arguments) for seed in range(arguments.seeds)]
        mean, half = interval([right for right, _ in found])
        seconds = statistics.mean(taken for _, taken in found)
        rows.append({"task": task, "family": family, "parameters": parameters[family], "mean": mean, "half_width": half,
                     "values": [right for right, _ in found], "seconds": seconds})  # fmt: skip
        arguments.out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
        width = "" if half is None else f" ± {half:6.1%}"
        print(f"{task:15} {family:16} {parameters[family]:9,}  {mean:6.1%}{width}  {seconds:5.1f} s", flush=True)


if __name__ == "__main__":
    main()
