"""Pictures, sounds and films answered in text, and digits drawn from tokens: accuracy on held-out items, against chance.

    python benchmarks/multimodal.py [digits sounds films drawing playing] [--steps 600]

Each experiment trains one small model on one core from data that needs no download, and asks about items it has not seen:
`digits` which digit a scan shows and whether it is even (the writers are others), `sounds` pitch and rhythm of synthesised
tones, `films` where a digit moves in four frames, `drawing` "draw a 7" through a codebook of 2 × 2 patches, judged by a
logistic regression trained on real digits, `playing` a low, middle or high tone the same way, judged by its loudest band.
`blind` is the same question beside another item: what the words alone
tell. Intervals are Wilson's at 95 %. Writes benchmarks/results/multimodal.json.
"""

import argparse
import json
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from headspring.data.media import DIRECTIONS, RATE, Digits, digits, film, tones
from headspring.data.media_questions import BEATS, NAMES, PITCHES
from headspring.data.multimodal import Example, example, join_examples
from headspring.data.rows import Rows
from headspring.inference.multimodal import answer
from headspring.models import Attention, Block, Decoder, Full, NoPE, SwiGLU, repeat
from headspring.models.audio import Sound, hertz_to_mel
from headspring.models.codebook import fit_codebook
from headspring.models.multimodal import Multimodal
from headspring.models.tower import Tower
from headspring.models.vision import Vision, from_patches, patches
from headspring.posttraining.rates import wilson
from headspring.tokenization.tokenizer import Tokenizer
from headspring.tokenization.train import TokenizerConfig, train_tokenizer
from headspring.training.config import TrainConfig
from headspring.training.loop import train
from headspring.training.multimodal import Answers
from headspring.training.optimizers import AdamW

Question = tuple[str, str]  # and the answer to it


def lines() -> list[str]:
    """All that is ever said, for the tokenizer."""
    words = [*NAMES, *PITCHES, *DIRECTIONS, "yes", "no"]
    asked = ["which digit is this?", "is it even?", "how high is it?", "how many beats?", "where does it move?"]
    return (asked + words + [f"draw a {name}" for name in NAMES]) * 4


def decoder(vocab: int, context: int) -> Decoder:
    block = Block(mixer=Attention(heads=4), feedforward=SwiGLU(hidden=160))
    return Decoder(vocab=vocab, width=64, layers=repeat(2, block), context=context)


def inside(count: int = 2) -> dict:
    mixer = Attention(heads=4, position=NoPE(), mask=Full())
    return {"width": 64, "blocks": repeat(count, Block(mixer=mixer, feedforward=SwiGLU(hidden=160)))}


def config(steps: int) -> TrainConfig:
    optimizer = AdamW(learning_rate=0.003, weight_decay=0.01)
    return TrainConfig(
        steps=steps, batch_size=32, precision="fp32", compile="never", checkpoint_every=10**6, optimizer=optimizer
    )


class Asking:
    """Questions about one item each: how a prompt is written, and how an answer is judged."""

    def __init__(self, tokenizer: Tokenizer, name: str, tower: Tower, items: int = 1):
        self.tokenizer, self.name, self.tower, self.items = tokenizer, name, tower, items
        context = items * tower.num_pieces + 32
        self.model = Multimodal(decoder=decoder(tokenizer.vocab_size + 2, context), towers={name: tower}).build()

    def prompt(self, question: str) -> list[int]:
        return [self.tokenizer.bos_id, *[self.tower.placeholder] * (self.items * self.tower.num_pieces),
                *self.tokenizer.encode(question)]  # fmt: skip

    def example(self, question: Question, item: np.ndarray) -> Example:
        reply = [*self.tokenizer.encode(question[1]), self.tokenizer.eos_id]
        return example(self.prompt(question[0]), reply, {self.name: item})

    def ask(self, questions: list[str], items: list[np.ndarray]) -> list[str]:
        prompts = [np.array(self.prompt(question)) for question in questions]
        media = [{self.name: item} for item in items]
        return [self.tokenizer.decode(ids) for ids in answer(self.model, prompts, media, 8, self.tokenizer.eos_id)]


def trial(
    asking: Asking, learn: list[tuple[Question, np.ndarray]], test: list[tuple[Question, np.ndarray]], steps: int
) -> dict:
    """Train, ask, and ask again beside other items."""
    rows = Rows([asking.example(*row) for row in learn], join_examples, asking.model.config.context)
    with tempfile.TemporaryDirectory() as place:
        result = train(asking.model, Answers(), rows, config(steps), Path(place))
    asked, items = [question for question, _ in test], [item for _, item in test]
    others = [items[i] for i in np.random.default_rng(0).permutation(len(items))]
    report: dict = {"parameters": asking.model.num_parameters(), "train_seconds": round(result.seconds, 1), "steps": steps}
    for label, shown in (("seen", items), ("blind", others)):
        said = asking.ask([question for question, _ in asked], shown)
        right = defaultdict(list)
        for (question, expected), reply in zip(asked, said, strict=True):
            right[question].append(reply.strip() == expected)
        report[label] = {question: rate(found) for question, found in right.items()}
    common = defaultdict(list)
    for question, expected in asked:
        common[question].append(expected)
    report["commonest"] = {q: round(max(map(said.count, set(said))) / len(said), 3) for q, said in common.items()}
    return report


def rate(right: list[bool]) -> dict:
    low, high = wilson(sum(right), len(right))
    return {"accuracy": round(sum(right) / len(right), 3), "interval": [round(low, 3), round(high, 3)], "asked": len(right)}


# ---- the experiments


def about_digits(tokenizer: Tokenizer, steps: int) -> dict:
    tower = Vision(placeholder=tokenizer.vocab_size, height=8, columns=8, patch=2, **inside())

    def rows(found: Digits) -> list[tuple[Question, np.ndarray]]:
        asked: list[Callable[[int], Question]] = [
            lambda digit: ("which digit is this?", NAMES[digit]),
            lambda digit: ("is it even?", "no" if digit % 2 else "yes"),
        ]
        return [(ask(int(d)), p[None, None]) for p, d in zip(found.pictures, found.labels) for ask in asked]

    learn, test = digits()
    return trial(Asking(tokenizer, "image", tower), rows(learn), rows(test), steps)


def about_sounds(tokenizer: Tokenizer, steps: int) -> dict:
    samples = 6144
    tower = Sound(placeholder=tokenizer.vocab_size + 1, samples=samples, frames=4, **inside())

    def rows(count: int, seed: int) -> list[tuple[Question, np.ndarray]]:
        draw, made = np.random.default_rng(seed), []
        for _ in range(count):
            pitch, beats = draw.choice(list(PITCHES)), draw.choice(list(BEATS))
            wave = tones(PITCHES[pitch] * draw.uniform(0.75, 1.3), BEATS[beats], samples, draw, noise=0.2)[None]
            made += [(("how high is it?", str(pitch)), wave), (("how many beats?", str(beats)), wave)]
        return made

    return trial(Asking(tokenizer, "sound", tower), rows(800, 1), rows(200, 2), steps)


def about_films(tokenizer: Tokenizer, steps: int) -> dict:
    tower = Vision(placeholder=tokenizer.vocab_size, height=12, columns=12, patch=4, **inside())

    def rows(found: Digits, times: int, seed: int) -> list[tuple[Question, np.ndarray]]:
        draw, made = np.random.default_rng(seed), []
        for picture in np.repeat(found.pictures, times, axis=0):
            direction = str(draw.choice(list(DIRECTIONS)))
            made.append((("where does it move?", direction), film(picture, direction, draw)[:, None]))
        return made

    learn, test = digits()
    return trial(Asking(tokenizer, "image", tower, items=4), rows(learn, 3, 1), rows(test, 1, 2), steps)


def drawing(tokenizer: Tokenizer, steps: int, codes: int = 64) -> dict:
    """The picture is text here: sixteen tokens of the vocabulary, of which each is a patch."""
    from sklearn.linear_model import LogisticRegression

    learn, test = digits()
    judge = LogisticRegression(max_iter=500).fit(learn.pictures.reshape(len(learn), -1), learn.labels)
    pieces = patches(torch.from_numpy(learn.pictures)[:, None], 2)
    book = fit_codebook(pieces.flatten(0, 1), codes, offset=tokenizer.vocab_size)
    ids = book.encode(pieces).tolist()
    prompts = [[tokenizer.bos_id, *tokenizer.encode(f"draw a {name}")] for name in NAMES]
    rows = [example(prompts[label], drawn) for label, drawn in zip(learn.labels, ids)]
    model = decoder(tokenizer.vocab_size + codes, 48).build()
    with tempfile.TemporaryDirectory() as place:
        result = train(model, Answers(), Rows(rows, join_examples, 48), config(steps), Path(place))
    wanted = [digit for digit in range(10) for _ in range(30)]
    allowed = range(book.offset, book.offset + codes)
    drawn = answer(model, [np.array(prompts[digit]) for digit in wanted], (), 16, allowed=allowed, temperature=0.7)

    def judged(ids: torch.Tensor, labels: list[int]) -> dict:
        shown = from_patches(book.decode(ids), 2, 8, 8).flatten(1).numpy()
        return rate((judge.predict(shown) == np.array(labels)).tolist())

    there = patches(torch.from_numpy(test.pictures)[:, None], 2)
    known = {tuple(row) for row in ids}
    return {
        "parameters": model.num_parameters(),
        "train_seconds": round(result.seconds, 1),
        "steps": steps,
        "drawn": judged(torch.tensor(drawn), wanted),
        "copies_of_training_pictures": round(sum(tuple(row) in known for row in drawn) / len(drawn), 3),
        "ceiling_real_pictures": rate((judge.predict(test.pictures.reshape(len(test), -1)) == test.labels).tolist()),
        "ceiling_through_the_codebook": judged(book.encode(there), test.labels.tolist()),
        "blind": judged(torch.tensor(drawn), np.random.default_rng(0).permutation(wanted).tolist()),
    }


def playing(tokenizer: Tokenizer, steps: int, codes: int = 64) -> dict:
    """The same with sounds: eleven tokens of the vocabulary, of which each is two log-mel frames."""
    heard, draw = Sound(placeholder=0, samples=3072, frames=2), np.random.default_rng(1)
    labels = [str(draw.choice(list(PITCHES))) for _ in range(600)]
    waves = [tones(PITCHES[name] * draw.uniform(0.75, 1.3), 1, heard.samples, draw) for name in labels]
    pieces = heard.pieces(torch.from_numpy(np.stack(waves)))
    book = fit_codebook(pieces.flatten(0, 1), codes, offset=tokenizer.vocab_size)
    prompts = {name: [tokenizer.bos_id, *tokenizer.encode(f"play a {name} tone")] for name in PITCHES}
    rows = [example(prompts[name], ids) for name, ids in zip(labels, book.encode(pieces).tolist())]
    model = decoder(tokenizer.vocab_size + codes, 48).build()
    with tempfile.TemporaryDirectory() as place:
        result = train(model, Answers(), Rows(rows, join_examples, 48), config(steps), Path(place))
    wanted = [name for name in PITCHES for _ in range(100)]
    allowed = range(book.offset, book.offset + codes)
    asked = [np.array(prompts[name]) for name in wanted]
    played = torch.tensor(answer(model, asked, (), heard.num_pieces, allowed=allowed, temperature=0.7))

    def pitch(frames: torch.Tensor) -> str:
        """The name whose frequency is nearest, in mel, to the loudest band of frames (P, F)."""
        loudest = int(frames.unflatten(1, (heard.frames, heard.bands)).mean((0, 1)).argmax())
        mel = hertz_to_mel(RATE / 2) * (loudest + 1) / (heard.bands + 1)
        return min(PITCHES, key=lambda name: abs(hertz_to_mel(PITCHES[name]) - mel))

    def judged(sounds: torch.Tensor, expected: list[str]) -> dict:
        return rate([pitch(frames) == name for frames, name in zip(sounds, expected, strict=True)])

    return {
        "parameters": model.num_parameters(),
        "train_seconds": round(result.seconds, 1),
        "steps": steps,
        "played": judged(book.decode(played), wanted),
        "ceiling_real_sounds": judged(pieces, labels),
        "ceiling_through_the_codebook": judged(book.decode(book.encode(pieces)), labels),
        "blind": judged(book.decode(played), np.random.default_rng(0).permutation(wanted).tolist()),
    }


EXPERIMENTS = {"digits": about_digits, "sounds": about_sounds, "films": about_films, "drawing": drawing, "playing": playing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", choices=[*EXPERIMENTS, []], help="default: all")
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = train_tokenizer(lines(), TokenizerConfig(vocab_size=300))
    path = Path(__file__).parent / "results" / "multimodal.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    for name in options.experiments or EXPERIMENTS:
        started = time.perf_counter()
        report[name] = EXPERIMENTS[name](tokenizer, options.steps)
        report[name]["seconds"] = round(time.perf_counter() - started, 1)
        report["machine"] = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": 1}
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(name, json.dumps(report[name], indent=1), flush=True)


if __name__ == "__main__":
    main()
