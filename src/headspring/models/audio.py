"""Sound as a log-mel spectrogram, the front end of Whisper (arXiv 2212.04356) and of nearly all speech recognition.

    wave (N, S) → |STFT|² (N, bins, frames) → mel bands (N, M, frames) → log → runs of frames, one a piece

The mel scale is that of O'Shaughnessy 1987 as in HTK, m = 2595 log₁₀(1 + f / 700): equal steps sound equally far apart. Each
band is a triangle between its neighbours' centres. What it gives up: phase, and so the way back to a wave.
"""

import math
from typing import Literal

import torch
from pydantic import Field, model_validator

from headspring.artifacts.errors import UserError
from headspring.models.tower import Tower

FLOOR = 1e-6  # power below which all is silence


class Sound(Tower):
    """Waves (N, samples) at `rate` samples a second, in frames of `window` samples that begin `hop` apart, `bands` numbers
    each; `frames` of them make a piece."""

    kind: Literal["sound"] = "sound"
    samples: int = Field(gt=0)
    rate: int = Field(8000, gt=0)
    window: int = Field(256, gt=1)
    hop: int = Field(128, gt=0)
    bands: int = Field(32, gt=0)
    frames: int = Field(4, gt=0)

    @model_validator(mode="after")
    def _has_a_piece(self) -> "Sound":
        if self.samples < self.window + (self.frames - 1) * self.hop:
            raise ValueError(f"{self.samples} samples are not even one piece of {self.frames} frames")
        if bool((mel_filters(self.window // 2 + 1, self.bands, self.rate).sum(0) == 0).any()):
            raise ValueError(f"{self.bands} bands are too narrow for the bins of a window of {self.window}: fewer, or longer")
        return self

    @property
    def num_pieces(self) -> int:
        return ((self.samples - self.window) // self.hop + 1) // self.frames

    @property
    def num_features(self) -> int:
        return self.bands * self.frames

    def pieces(self, raw: torch.Tensor) -> torch.Tensor:
        if raw.shape[1:] != (self.samples,):
            raise UserError(f"this model hears waves of {self.samples} samples, not of shape {tuple(raw.shape[1:])}")
        heard = log_mel(raw, self.rate, self.window, self.hop, self.bands).mT  # (N, frames, M)
        whole = heard[:, : self.num_pieces * self.frames]  # the frames after the last whole piece are left out
        return whole.unflatten(1, (-1, self.frames)).flatten(2) / 5 + 0.5  # about −2 … 2


def log_mel(wave: torch.Tensor, rate: int, window: int, hop: int, bands: int) -> torch.Tensor:
    """(N, S) float32 → (N, bands, 1 + (S − window) // hop): natural logarithms of power, frames unpadded."""
    taper = torch.hann_window(window, device=wave.device)
    spectrum = torch.stft(wave, window, hop, window=taper, center=False, return_complex=True)
    power = spectrum.abs().square() / taper.sum().square()
    filters = mel_filters(window // 2 + 1, bands, rate).to(wave.device)
    return (filters.T @ power).clamp(min=FLOOR).log()


def mel_filters(bins: int, bands: int, rate: int) -> torch.Tensor:
    """(bins, bands) float32: triangles of height 1 whose corners are equally spaced in mel from 0 to rate / 2."""
    top = hertz_to_mel(rate / 2)
    corners = torch.tensor([mel_to_hertz(top * i / (bands + 1)) for i in range(bands + 2)], dtype=torch.float64)
    frequency = torch.linspace(0, rate / 2, bins, dtype=torch.float64)[:, None]
    rising = (frequency - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - frequency) / (corners[2:] - corners[1:-1])
    return torch.minimum(rising, falling).clamp(min=0).float()


def hertz_to_mel(frequency: float) -> float:
    return 2595 * math.log10(1 + frequency / 700)


def mel_to_hertz(mel: float) -> float:
    return 700 * (10 ** (mel / 2595) - 1)
