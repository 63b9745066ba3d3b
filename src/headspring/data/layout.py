"""How one source's stream of documents becomes rows of T tokens, and which rows hold a given stretch of it.

    stream      | b a a a a e | b c c e | b d d d d d d e |            b = bos, e = eos, T = 6

    concat      b a a a a e · b c c e b d · d d d d d e                rows cut at multiples of T
                                                                       (what is left at the end, < T, is cropped)
    best_fit    b a a a a e · b d d d d d · d e b c c e                a document that fits is never cut

`Concatenated` wastes nothing but the last partial row; documents are cut wherever a row ends. `BestFit` keeps every
document that fits in a row whole and pads what stays free (Ding et al., arXiv 2404.10830, best-fit-decreasing bin
packing); longer ones are cut in full rows and a rest. In both, an input predicts the next token of its own document
only: the last token of a document has the target IGNORE, so `bos` is context and never predicted.

A run of tokens [start, end) that lies in a row from column `column` on is a `Run`; `runs(start, end)` is the exact
inverse of `sample(row)`.
"""

from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np

from headspring.data.batch import IGNORE, Sample

WINDOW = 16_384  # documents that best_fit arranges together: bounds how far from its place in the stream one can land


class Run(NamedTuple):
    """Tokens `start` … `end` − 1 of the stream are the inputs of `row` from `column` on."""

    row: int
    column: int
    start: int
    end: int


class Layout(Protocol):
    """Rows 0 … `num_rows` − 1 of one source, each a pure function of its number."""

    num_rows: int

    def sample(self, row: int) -> Sample: ...

    def runs(self, start: int, end: int) -> list[Run]:
        """Where tokens [start, end) of the stream are inputs, in stream order; cropped tokens are nowhere."""
        ...

    def token_at(self, row: int, column: int) -> int | None:
        """The token of the stream that stands there; None for padding."""
        ...

    def ledger(self) -> dict[str, int]:
        """What becomes of every token in one epoch: tokens = inputs + cropped, positions = inputs + padded,
        inputs = trained + last_of_document."""
        ...


class Concatenated:
    """Row r is tokens [r·T, r·T + T) of the stream. `token_start` (D,): where the documents begin, ascending."""

    def __init__(self, tokens: np.ndarray, token_start: np.ndarray, sequence_length: int):
        self.tokens, self.token_start, self.sequence_length = tokens.view(np.ndarray), token_start, sequence_length
        self.num_rows = len(tokens) // sequence_length

    def sample(self, row: int) -> Sample:
        T = self.sequence_length
        begin = row * T
        stream = self.tokens[begin : begin + T + 1].astype(np.int64)
        inputs, targets = stream[:T], np.full(T, IGNORE, np.int64)
        targets[: len(stream) - 1] = stream[1:]
        low, high = self.token_start.searchsorted((begin + 1, begin + T + 1))
        borders = self.token_start[low:high] - begin  # columns 1 … T at which a new document begins
        targets[borders - 1] = IGNORE
        segments = np.zeros(T, np.int32)
        segments[borders[borders < T]] = 1
        return Sample(inputs, targets, segments.cumsum(dtype=np.int32))

    def runs(self, start: int, end: int) -> list[Run]:
        T, end = self.sequence_length, min(end, self.num_rows * self.sequence_length)
        cuts = [start, *range((start // T + 1) * T, end, T), end]
        return [Run(a // T, a % T, a, b) for a, b in pairwise(cuts) if a < b]

    def token_at(self, row: int, column: int) -> int | None:
        return row * self.sequence_length + column

    def ledger(self) -> dict[str, int]:
        tokens, inputs = len(self.tokens), self.num_rows * self.sequence_length
        ends = int(np.searchsorted(self.token_start[1:], inputs, side="right")) + (inputs == tokens)
        return _ledger(tokens, inputs, inputs, ends)


class BestFit:
    """Whole documents placed into rows by best-fit-decreasing, window by window; free places hold `pad_id`.

    Padding has the target IGNORE and is the row's last segment. A row holds at most one piece of any document."""

    def __init__(self, tokens: np.ndarray, token_start: np.ndarray, sequence_length: int, pad_id: int):
        self.tokens, self.sequence_length, self.pad_id = tokens.view(np.ndarray), sequence_length, pad_id
        token_end = np.append(token_start[1:], len(tokens))
        # The pieces of all documents in stream order: (P,) arrays.
        pieces = -(-(token_end - token_start) // sequence_length)
        first = np.cumsum(pieces) - pieces
        within = np.arange(pieces.sum()) - np.repeat(first, pieces)
        self.start = np.repeat(token_start, pieces) + within * sequence_length
        self.length = np.minimum(np.repeat(token_end, pieces) - self.start, sequence_length)
        self.last = np.repeat(pieces, pieces) == within + 1
        self.row, self.num_rows = _assign_rows(self.length, sequence_length)
        # The pieces of a row stand in stream order.
        self._by_row = np.argsort(self.row, kind="stable")
        self._row_begin = np.searchsorted(self.row[self._by_row], np.arange(self.num_rows + 1))
        filled = np.cumsum(self.length[self._by_row]) - self.length[self._by_row]
        self.column = np.empty_like(self.start)
        self.column[self._by_row] = filled - filled[self._row_begin[self.row[self._by_row]]]

    def sample(self, row: int) -> Sample:
        T = self.sequence_length
        pieces = self._by_row[self._row_begin[row] : self._row_begin[row + 1]]
        length, column = self.length[pieces], self.column[pieces]
        used = int(length.sum())
        source = np.repeat(self.start[pieces] - column, length) + np.arange(used)
        inputs, targets = np.full(T, self.pad_id, np.int64), np.full(T, IGNORE, np.int64)
        segments = np.full(T, len(pieces), np.int32)
        inputs[:used] = self.tokens[source]
        targets[:used] = self.tokens.take(source + 1, mode="clip")
        targets[(column + length - 1)[self.last[pieces]]] = IGNORE
        segments[:used] = np.repeat(np.arange(len(pieces), dtype=np.int32), length)
        return Sample(inputs, targets, segments)

    def runs(self, start: int, end: int) -> list[Run]:
        low = int(self.start.searchsorted(start, side="right")) - 1
        high = int(self.start.searchsorted(end, side="left"))
        runs = []
        for p in range(low, high):
            begin, column = int(self.start[p]), int(self.column[p])
            a, b = max(start, begin), min(end, begin + int(self.length[p]))
            if a < b:
                runs.append(Run(int(self.row[p]), column + a - begin, a, b))
        return runs

    def token_at(self, row: int, column: int) -> int | None:
        for p in self._by_row[self._row_begin[row] : self._row_begin[row + 1]].tolist():
            if self.column[p] <= column < self.column[p] + self.length[p]:
                return int(self.start[p]) + column - int(self.column[p])
        return None

    def ledger(self) -> dict[str, int]:
        return _ledger(len(self.tokens), self.num_rows * self.sequence_length, len(self.tokens), int(self.last.sum()))


def _assign_rows(length: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Best-fit-decreasing: (P,) row of each piece, and the number of rows.

    In each window the longest piece goes first, into the open row with the least room that still holds it."""
    rows, num_rows = np.empty(len(length), np.int64), 0
    for begin in range(0, len(length), WINDOW):
        window = length[begin : begin + WINDOW]
        open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by room left
        rooms = 0  # bit r: some open row has room r
        for p in np.argsort(-window, kind="stable").tolist():
            needed = int(window[p])
            fitting = rooms >> needed
            if fitting:
                room = needed + (fitting & -fitting).bit_length() - 1
                row = open_rows[room].pop()
                if not open_rows[room]:
                    rooms ^= 1 << room
            else:
                room, row, num_rows = capacity, num_rows, num_rows + 1
            rows[begin + p] = row
            if room > needed:
                open_rows[room - needed].append(row)
                rooms |= 1 << (room - needed)
    return rows, num_rows


def _ledger(tokens: int, positions: int, inputs: int, last_of_document: int) -> dict[str, int]:
    return {
        "tokens": tokens,
        "cropped": tokens - inputs,
        "inputs": inputs,
        "trained": inputs - last_of_document,
        "last_of_document": last_of_document,
        "positions": positions,
        "padded": positions - inputs,
    }
