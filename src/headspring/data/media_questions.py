"""Questions about pictures, films and sounds that need no download, for models that look and listen.

    digits   which digit a scan shows, and whether it is even        8 × 8 pixels, other writers are held out
    films    where a digit moves                                      four pictures, in order
    tones    how high a sound is, and how many beats it has           synthesised, with noise

The family is open: a new set of questions is a new class, which says what an item is and what is asked about it.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from headspring.artifacts.value import Variant
from headspring.data.media import DIRECTIONS, Digits, digits, film, tones

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PITCHES = {"low": 250.0, "middle": 600.0, "high": 1400.0}  # hertz
BEATS = {"one": 1, "two": 2, "three": 3, "four": 4}


@dataclass(frozen=True)
class Asked:
    """A question, the right answer, and the items (N, …) float32 that it is about."""

    question: str
    answer: str
    items: np.ndarray


class MediaQuestions(Variant):
    """A set of questions. `num_items` are shown with each, of `shape`."""

    kind: str
    num_items: ClassVar[int] = 1

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def asked(self, held_out: bool, seed: int) -> list[Asked]:
        """Those to train on, or those about items that are never trained on. What is drawn by chance, `seed` decides."""
        raise NotImplementedError


class AboutDigits(MediaQuestions):
    """scikit-learn's scans, in grey. Raises `UserError` without scikit-learn."""

    kind: Literal["digits"] = "digits"

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, 8, 8)

    def asked(self, held_out: bool, seed: int) -> list[Asked]:
        made = []
        for picture, digit in _scans(held_out):
            made.append(Asked("which digit is this?", NAMES[digit], picture[None, None]))
            made.append(Asked("is it even?", "no" if digit % 2 else "yes", picture[None, None]))
        return made


class AboutFilms(MediaQuestions):
    """The same scans, each moving a pixel a frame; `times` films of each to train on."""

    kind: Literal["films"] = "films"
    num_items: ClassVar[int] = 4
    times: int = Field(3, gt=0)

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, 12, 12)

    def asked(self, held_out: bool, seed: int) -> list[Asked]:
        draw, made = np.random.default_rng((seed, held_out)), []
        for picture, _ in _scans(held_out) * (1 if held_out else self.times):
            direction = str(draw.choice(list(DIRECTIONS)))
            shown = film(picture, direction, draw, frames=self.num_items, size=self.shape[-1])
            made.append(Asked("where does it move?", direction, shown[:, None]))
        return made


class AboutTones(MediaQuestions):
    """`sounds` waves of `samples` at 8,000 a second, a quarter as many held out, with white `noise`."""

    kind: Literal["tones"] = "tones"
    sounds: int = Field(800, gt=3)
    samples: int = Field(6144, gt=1023)
    noise: float = Field(0.2, ge=0)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.samples,)

    def asked(self, held_out: bool, seed: int) -> list[Asked]:
        draw, made = np.random.default_rng((seed, held_out)), []
        for _ in range(self.sounds // 4 if held_out else self.sounds):
            pitch, beats = str(draw.choice(list(PITCHES))), str(draw.choice(list(BEATS)))
            frequency = PITCHES[pitch] * draw.uniform(0.75, 1.3)
            wave = tones(frequency, BEATS[beats], self.samples, draw, self.noise)[None]
            made += [Asked("how high is it?", pitch, wave), Asked("how many beats?", beats, wave)]
        return made


def _scans(held_out: bool) -> list[tuple[np.ndarray, int]]:
    found: Digits = digits()[held_out]
    return [(picture, int(label)) for picture, label in zip(found.pictures, found.labels, strict=True)]
