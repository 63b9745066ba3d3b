"""Several streams of samples as one: which stream sample i comes from, and its exact inverse.

The interleaving is that of the pretraining mixture (data/mixture.py), with streams in the place of sources: each at its
own even pace, both directions closed formulas. So `sample(i)` stays a pure function and `where(document)` its inverse,
through two streams as through one.
"""

from collections.abc import Mapping

from headspring.data.batch import Sample, SampleSource, Visit
from headspring.data.mixture import Mixture


class Blend(SampleSource):
    """Samples 0 … `num_samples` − 1 drawn from `streams`, in proportion to `weights` (shares of the samples).

    Every stream must be defined for as many samples as it is asked for: one of `num_samples` always is."""

    def __init__(self, streams: Mapping[str, SampleSource], weights: Mapping[str, float], num_samples: int):
        (self.sequence_length,) = {stream.sequence_length for stream in streams.values()}
        self.streams, self.num_samples = dict(streams), num_samples
        self.schedule = Mixture(weights=dict(weights)).schedule(dict.fromkeys(streams, 1), num_samples)

    def __len__(self) -> int:
        return self.num_samples

    @property
    def counts(self) -> dict[str, int]:
        """How many samples each stream gives."""
        return self.schedule.counts

    def sample(self, index: int) -> Sample:
        """Sample `index`; `IndexError` outside 0 … num_samples − 1."""
        name, k = self.schedule.locate(index)
        return self.streams[name].sample(k)

    def where(self, document_id: str) -> list[Visit]:
        """Every visit of the document in any stream, in order of sample."""
        visits = [
            Visit(self.schedule.index(name, visit.sample), visit.start, visit.end, visit.byte_start, visit.byte_end)
            for name, stream in self.streams.items()
            for visit in stream.where(document_id)
            if visit.sample < self.counts[name]
        ]
        return sorted(visits, key=lambda visit: (visit.sample, visit.start))
