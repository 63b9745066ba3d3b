"""Pictures, films and sounds that need no download: scikit-learn's digits, the same digits moving, and synthesised tones.

The digits are 1,797 scans of 8 × 8 pixels from the UCI repository (Alpaydin and Kaynak 1998), shipped inside scikit-learn.
Writers follow one another, so that a split by place asks mostly about people who were not seen.
"""

from dataclasses import dataclass

import numpy as np

from headspring.artifacts.errors import UserError

DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
RATE = 8000  # samples a second


@dataclass(frozen=True)
class Digits:
    """`pictures` (n, 8, 8) float32 in 0 … 1 and the `labels` (n,) int64 that they show."""

    pictures: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


def digits(held_out: float = 0.25) -> tuple[Digits, Digits]:
    """Those to train on and the last share `held_out`. Raises `UserError` without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the digits come with scikit-learn: pip install scikit-learn") from None
    pixels, labels = load_digits(return_X_y=True)
    pictures, labels = (pixels / 16).reshape(-1, 8, 8).astype(np.float32), labels.astype(np.int64)
    cut = round(len(labels) * (1 - held_out))
    return Digits(pictures[:cut], labels[:cut]), Digits(pictures[cut:], labels[cut:])


def film(picture: np.ndarray, direction: str, draw: np.random.Generator, frames: int = 4, size: int = 12) -> np.ndarray:
    """(frames, size, size) float32: a picture (H, W) that moves a pixel a frame in a `direction`, in front of nothing."""
    step = np.array(DIRECTIONS[direction])
    room = size - np.array(picture.shape)
    travel = frames - 1
    if (room < travel).any():
        raise UserError(f"{frames} frames need a picture to move {travel} pixels, and it has room for {room.min()}")
    first = np.where(step > 0, 0, np.where(step < 0, travel, 0))
    slack = room - travel * np.abs(step)
    start = first + draw.integers(0, slack + 1)
    shown = np.zeros((frames, size, size), dtype=np.float32)
    for index in range(frames):
        top, left = start + index * step
        shown[index, top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return shown


def tones(frequency: float, beats: int, samples: int, draw: np.random.Generator, noise: float = 0.05) -> np.ndarray:
    """(samples,) float32: `beats` equal tones of `frequency` hertz with as much silence after each, a phase and a loudness
    drawn by chance, two overtones, and white `noise`."""
    time = np.arange(samples) / RATE
    phase, loudness = draw.uniform(0, 2 * np.pi), draw.uniform(0.3, 1.0)
    wave = sum(np.sin(2 * np.pi * k * frequency * time + phase) / k**2 for k in (1, 2, 3))
    sounding = (np.arange(samples) * 2 * beats // samples) % 2 == 0
    return (loudness * wave * sounding + noise * draw.standard_normal(samples)).astype(np.float32)
