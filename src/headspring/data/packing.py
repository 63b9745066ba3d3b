"""The pretraining stream: sample i as a pure function of (shards, settings, i), and its exact inverse.

    i ── mixture ──▶ (source, k) ── epoch, permutation ──▶ row ── layout ──▶ inputs, targets, segments
    i ◀── mixture ── (source, k) ◀── epoch, inverse ─────── row ◀── layout ── document

Each arrow is a function without state: `Schedule` (data/mixture.py), `Epochs` (data/permutation.py: another order
every epoch) and a `Layout` (data/layout.py). So resuming is one integer, the stream is the same for every number of
ranks, workers and threads, and `where(document)` walks the same arrows backwards instead of searching.
Why not an iterator with a shuffle buffer: its position is a state that has to be saved, and it has no inverse.
What it gives up: rows are cut once, so the same cuts come back, in another order, in every epoch.
"""

from typing import Literal

import numpy as np

from headspring.artifacts import UserError
from headspring.data.batch import Sample, SampleSource, Visit
from headspring.data.layout import BestFit, Concatenated, Layout
from headspring.data.mixture import Mixture, nearest
from headspring.data.permutation import Epochs
from headspring.data.shards import TokenShards
from headspring.data.store import SPLITS

Packing = Literal["concat", "best_fit"]


class PackedTokens(SampleSource):
    """Samples 0 … `num_samples` − 1 of a run over one split of token shards.

    `packing`: "concat" cuts the stream every `sequence_length` tokens and loses only each source's last partial row;
    "best_fit" keeps documents whole where they fit and pads. `num_samples` None means one epoch's worth of rows.
    `sample(i)` may be called from any thread. Raises `UserError` for an empty split, a source that does not exist, and
    a source with weight whose tokens do not fill one sequence."""

    def __init__(
        self,
        shards: TokenShards,
        split: str,
        sequence_length: int,
        mixture: Mixture | None = None,
        seed: int = 0,
        packing: Packing = "concat",
        num_samples: int | None = None,
    ):
        if packing not in ("concat", "best_fit"):
            raise UserError(f"packing: '{packing}' does not exist; use 'concat' or 'best_fit'")
        if sequence_length < 1:
            raise UserError(f"sequence_length: {sequence_length} is too small; use at least 1")
        if num_samples is not None and num_samples < 0:
            raise UserError(f"num_samples: {num_samples} is negative; use 0 or more, or none for one epoch")
        self._arguments = (shards, split, sequence_length, mixture, seed, packing, num_samples)
        self.shards, self.split, self.sequence_length, self.seed = shards, split, sequence_length, seed
        mixture = mixture or Mixture()
        active, known = self._sources(mixture)
        self.layouts: dict[str, Layout] = {name: self._layout(name, packing) for name in active}
        self._orders = {name: Epochs(layout.num_rows, seed, split, name) for name, layout in self.layouts.items()}
        self._sizes = {name: self.layouts[name].num_rows if name in active else 0 for name in known}
        self.num_samples = sum(self._sizes.values()) if num_samples is None else num_samples
        self.schedule = mixture.schedule(self._sizes, self.num_samples)

    def __reduce__(self):
        return PackedTokens, self._arguments  # a worker process rebuilds it from the shards

    def __len__(self) -> int:
        return self.num_samples

    def sample(self, index: int) -> Sample:
        """Inputs, targets and segments of sample `index`, each (T,). `IndexError` outside 0 … num_samples − 1."""
        source, row = self.row_of(index)
        return self.layouts[source].sample(row)

    def row_of(self, index: int) -> tuple[str, int]:
        """The source and the row of its layout that sample `index` shows."""
        source, k = self.schedule.locate(index)
        return source, self._orders[source](k)

    def samples_of(self, source: str, row: int) -> list[int]:
        """The inverse of `row_of`: every sample that shows `row` of `source`, ascending; one an epoch."""
        ks = self._orders[source].places(row, self.schedule.counts[source])
        return [self.schedule.index(source, k) for k in ks]

    def where(self, document_id: str) -> list[Visit]:
        """Every run of a document's tokens among the inputs of this run's samples, in order of sample.

        A removed duplicate has its survivor's visits. A document that is not in this split, or that no sample reached,
        has none. Byte spans are in the document's text; a run of control tokens alone has an empty one."""
        visits = []
        for split, source, number in self.shards.find(document_id):
            if split == self.split and source in self.layouts:
                visits += self._visits(source, number)
        return sorted(visits, key=lambda visit: (visit.sample, visit.start))

    def origin(self, index: int, position: int) -> tuple[str, int, int] | None:
        """(document id, byte start, byte end) of input `position` of sample `index`; None for padding."""
        source, row = self.row_of(index)
        token = self.layouts[source].token_at(row, position)
        if token is None:
            return None
        start, end = self.shards.spans(self.split, source)[token].tolist()
        return self.shards.document_at(self.split, source, token), start, end

    def ledger(self) -> dict[str, dict[str, int]]:
        """For each source, what becomes of its tokens in one epoch (`Layout.ledger`), and its samples in this run."""
        counts = self.schedule.counts
        return {source: {**layout.ledger(), "samples": counts[source]} for source, layout in self.layouts.items()}

    def tree(self) -> str:
        """The mixture of this run, drawn as text."""
        tokens = {source: self.shards.num_tokens(self.split, source) for source in self._sizes}
        return self.schedule.tree(self._sizes, tokens)

    def _visits(self, source: str, number: int) -> list[Visit]:
        documents, spans = self.shards.documents(self.split, source), self.shards.spans(self.split, source)
        visits = []
        for run in self.layouts[source].runs(int(documents.token_start[number]), int(documents.token_end[number])):
            bytes_ = _byte_span(spans[run.start : run.end])
            last = run.column + run.end - run.start
            visits += [Visit(sample, run.column, last, *bytes_) for sample in self.samples_of(source, run.row)]
        return visits

    def _sources(self, mixture: Mixture) -> tuple[list[str], list[str]]:
        """The sources that take part (those with a weight; without weights, all of the split), and all there are."""
        if self.split not in SPLITS:
            raise UserError(f"no split named '{self.split}'; {nearest(self.split, SPLITS, 'the splits are')}")
        present = self.shards.sources(self.split)
        if not present:
            raise UserError(f"the {self.split} split is empty; add text or give it a larger fraction in the data stage")
        known = sorted({source for split in self.shards.splits for source in self.shards.sources(split)})
        named = mixture.named(known)
        for name in named:
            if name not in present:
                raise UserError(f"mixture: source '{name}' has no text in the {self.split} split; leave it out")
        return [name for name in present if mixture.by_size or name in named], known

    def _layout(self, source: str, packing: Packing) -> Layout:
        tokens = self.shards.tokens(self.split, source)
        starts = self.shards.documents(self.split, source).token_start
        if packing == "best_fit":
            control = self.shards.control
            usable = [token for token in (control["pad"], control["eos"]) if token is not None]
            return BestFit(tokens, starts, self.sequence_length, pad_id=usable[0] if usable else 0)
        if len(tokens) < self.sequence_length:
            raise UserError(
                f"the {self.split} split of source {source} has {len(tokens):,} tokens, fewer than one sequence of "
                f"{self.sequence_length:,}; lower sequence_length or add text"
            )
        return Concatenated(tokens, starts, self.sequence_length)


def _byte_span(spans: np.ndarray) -> tuple[int, int]:
    """First to last byte of (n, 2) token spans; control tokens, whose span is empty, do not count unless alone."""
    written = spans[spans[:, 0] < spans[:, 1]]
    if not len(written):
        return int(spans[0, 0]), int(spans[0, 0])
    return int(written[:, 0].min()), int(written[:, 1].max())
