"""Decontamination: a training document that quotes the tests is removed.

Every run of 13 words (lower case, no punctuation) of the evaluation texts goes into an index; a training document that
contains one of them is `contaminated`, and the reason quotes the words. 13 is GPT-3's choice (arXiv:2005.14165,
appendix C), and so is the exception: an n-gram found in more than 10 training documents is boilerplate (a licence
header, say) and marks nobody. An evaluation text with fewer than 13 words is looked for as a whole, if it has at least
`minimum_words`; shorter ones are in every corpus by chance, and are reported as not checked.

What it gives up: a paraphrase or a translation of a test passes.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from pydantic import Field

from headspring.artifacts.value import Value
from headspring.data.word_hashes import gram_hashes, word_hashes, words_of


class DecontaminationConfig(Value):
    """`ngram_words`: length of the runs compared. `boilerplate_documents`: an n-gram found in more training documents
    than this is ignored. `minimum_words`: shorter evaluation texts are not looked for."""

    enabled: bool = True
    ngram_words: int = Field(default=13, ge=3, le=64)
    boilerplate_documents: int = Field(default=10, ge=1)
    minimum_words: int = Field(default=8, ge=1)


@dataclass
class EvaluationIndex:
    """Sorted hashes of the evaluation texts' n-grams by their length in words."""

    config: DecontaminationConfig
    grams: dict[int, np.ndarray] = field(default_factory=dict)  # n → (G,) uint64, sorted and distinct
    texts: int = 0
    too_short: int = 0

    @classmethod
    def build(cls, texts: Iterable[str], config: DecontaminationConfig) -> "EvaluationIndex":
        index = cls(config)
        by_length: dict[int, list[str]] = {}
        for text in texts:
            index.texts += 1
            words = len(words_of(text).split())
            if words < config.minimum_words:
                index.too_short += 1
            else:
                by_length.setdefault(min(words, config.ngram_words), []).append(text)
        index.grams = {n: np.unique(gram_hashes(group, n).hashes) for n, group in sorted(by_length.items())}
        return index

    def hits(self, texts: Sequence[str]) -> list[dict[int, list[int]]]:
        """For each text: n → hashes of its n-grams that are in the index, distinct, in order of first appearance."""
        found: list[dict[int, list[int]]] = [{} for _ in texts]
        for n, known in self.grams.items():
            grams = gram_hashes(texts, n, whole=False)
            places = np.flatnonzero(_contains(known, grams.hashes))
            documents = np.searchsorted(grams.offsets, places, side="right") - 1
            for place, document in zip(places.tolist(), documents.tolist(), strict=True):
                hashes = found[document].setdefault(n, [])
                value = int(grams.hashes[place])
                if value not in hashes:
                    hashes.append(value)
        return found


@dataclass
class Contamination:
    """Counts in how many documents each n-gram was found, then decides; documents are added by index."""

    index: EvaluationIndex
    found: dict[int, dict[int, list[int]]] = field(default_factory=dict)  # document → n → hashes
    documents: Counter[int] = field(default_factory=Counter)  # hash → documents it is in

    def add(self, documents: Sequence[int], texts: Sequence[str]) -> None:
        for document, hits in zip(documents, self.index.hits(texts), strict=True):
            if hits:
                self.found[document] = hits
                self.documents.update(value for hashes in hits.values() for value in hashes)

    @property
    def boilerplate(self) -> int:
        """N-grams of the evaluation texts that are too common to mean anything."""
        return sum(count > self.index.config.boilerplate_documents for count in self.documents.values())

    def contaminated(self) -> dict[int, tuple[int, int]]:
        """document → (n, hash) of the first n-gram that is not boilerplate."""
        limit = self.index.config.boilerplate_documents
        rare = {
            document: [(n, value) for n, hashes in hits.items() for value in hashes if self.documents[value] <= limit]
            for document, hits in self.found.items()
        }
        return {document: grams[0] for document, grams in rare.items() if grams}


def quote(text: str, n: int, gram: int) -> str:
    """The `n` words of `text` whose hash is `gram`, as they are compared."""
    place = np.flatnonzero(gram_hashes([text], n, whole=False).hashes == np.uint64(gram))
    words = words_of(text).split()
    assert len(words) == len(word_hashes([text]).hashes)
    return b" ".join(words[place[0] : place[0] + n]).decode("utf-8", "replace") if len(place) else ""


def _contains(sorted_values: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(V,) bool: which of `values` are among `sorted_values`."""
    if not len(sorted_values):
        return np.zeros(len(values), bool)
    places = np.minimum(np.searchsorted(sorted_values, values), len(sorted_values) - 1)
    return sorted_values[places] == values
