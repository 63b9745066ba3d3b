"""The bytes of Python's standard library, for experiments with models that are trained in a minute.

Bytes and not tokens, so that no tokenizer has to be trained; whole files are held out.
"""

import sysconfig
from pathlib import Path

import numpy as np

from headspring.data.batch import Sample, Visit

VOCAB = 256
HELD_OUT = 20  # every 20th file


def read(held_out: bool) -> np.ndarray:
    """(N,) uint8: modules of the standard library one after another, without its tests."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    files = [file for file in files if not {"test", "tests", "site-packages", "dist-packages"} & set(file.parts)]
    chosen = [file for index, file in enumerate(files) if (index % HELD_OUT == 0) == held_out]
    return np.frombuffer(b"".join(file.read_bytes() for file in chosen), dtype=np.uint8)


class Windows:
    """Random windows of `sequence_length` bytes and the byte after each: a pure function of (seed, index)."""

    def __init__(self, data: np.ndarray, sequence_length: int, seed: int):
        self.data, self.sequence_length, self.seed = data, sequence_length, seed

    def sample(self, index: int) -> Sample:
        start = np.random.default_rng((self.seed, index)).integers(0, len(self.data) - self.sequence_length - 1)
        window = self.data[start : start + self.sequence_length + 1].astype(np.int64)
        return Sample(window[:-1], window[1:], np.zeros(self.sequence_length, dtype=np.int32))

    def where(self, document_id: str) -> list[Visit]:
        return []
