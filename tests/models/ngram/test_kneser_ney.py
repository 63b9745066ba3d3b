"""The n-gram model against a reference that is slow and obvious, and against numbers worked out by hand."""

from collections import Counter, defaultdict
from math import log

import numpy as np
import pytest

from headspring.artifacts import UserError
from headspring.models.ngram.kneser_ney import FALLBACK_DISCOUNTS, KneserNey

BOS, EOS, VOCAB = 0, 1, 9


def corpus(seed: int, number: int = 40) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, VOCAB - 1)
    draw = lambda: rng.choice(np.arange(2, VOCAB), rng.integers(0, 12), p=weights / weights.sum())
    return [np.array([BOS, *draw(), EOS]) for _ in range(number)]


class Reference:
    """Chen & Goodman's formulas with dictionaries of tuples."""

    def __init__(self, documents, order):
        self.order = order
        raw = [Counter(tuple(d[i : i + n]) for d in documents for i in range(len(d) - n + 1)) for n in range(1, order + 1)]
        self.counts = []
        for n in range(1, order + 1):
            if n == order:
                counts = dict(raw[n - 1])
            else:
                before = defaultdict(set)
                for gram in raw[n]:
                    before[gram[1:]].add(gram[0])
                counts = {g: raw[n - 1][g] if g[0] == BOS else len(before[g]) for g in raw[n - 1]}
            self.counts.append({g: c for g, c in counts.items() if g != (BOS,)})
        self.discounts = [self._discounts(list(counts.values())) for counts in self.counts]

    @staticmethod
    def _discounts(values):
        n = [None, *(values.count(k) for k in (1, 2, 3, 4))]
        if 0 in n[1:4]:
            return FALLBACK_DISCOUNTS
        y = n[1] / (n[1] + 2 * n[2])
        d = tuple(j - (j + 1) * y * n[j + 1] / n[j] for j in (1, 2, 3))
        return d if all(0 <= d[j - 1] <= j for j in (1, 2, 3)) else FALLBACK_DISCOUNTS

    def probability(self, context, word):
        context = tuple(context)[-(self.order - 1) :] if self.order > 1 else ()
        if word == BOS:
            return 0.0
        shorter = self.probability(context[1:], word) if context else 1 / (VOCAB - 1)
        n = len(context)
        following = {g[-1]: c for g, c in self.counts[n].items() if g[:-1] == context}
        total = sum(following.values())
        if not total:
            return shorter
        discount = lambda c: self.discounts[n][min(c, 3) - 1] if c else 0.0
        count = following.get(word, 0)
        return (count - discount(count) + sum(map(discount, following.values())) * shorter) / total


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_equals_the_reference(order):
    train, test = corpus(0), corpus(1, 8)
    model, reference = KneserNey(train, VOCAB, BOS, order), Reference(train, order)
    assert model.discounts == [pytest.approx(d) for d in reference.discounts]
    assert order == 1 or any(d != FALLBACK_DISCOUNTS for d in model.discounts)
    for document, found in zip(test, model.log_probs(test)):
        expected = [log(reference.probability(document[:i], document[i])) for i in range(1, len(document))]
        np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("context", [[BOS], [BOS, 2], [2, 3], [2, 3, 4, 5, 6], [BOS, 8, 8, 8, 8, 8, 8], [EOS]])
def test_probabilities_sum_to_one(context):
    distribution = KneserNey(corpus(2), VOCAB, BOS).distribution(context)
    assert distribution.sum() == pytest.approx(1.0, abs=1e-12) and distribution[BOS] == 0
    assert (np.delete(distribution, BOS) > 0).all()


def test_control_raw_counts_at_lower_orders_differ(monkeypatch):
    """Planted bug: without continuation counts this is not Kneser–Ney, and the reference notices."""
    monkeypatch.setattr("headspring.models.ngram.kneser_ney._adjust", lambda counted, order: [c[1] for c in counted])
    document = corpus(1, 1)[0]
    found = KneserNey(corpus(0), VOCAB, BOS, 3).log_probs([document])[0]
    reference = Reference(corpus(0), 3)
    expected = [log(reference.probability(document[:i], document[i])) for i in range(1, len(document))]
    assert not np.allclose(found, expected, rtol=1e-3)


def test_documents_do_not_leak_into_each_other():
    documents = corpus(3)
    model = KneserNey(documents, VOCAB, BOS)
    together, alone = model.log_probs(documents), [model.log_probs([d])[0] for d in documents]
    assert all(np.array_equal(a, b) for a, b in zip(together, alone))
    assert KneserNey(documents[::-1], VOCAB, BOS).log_probs(documents)[0] == pytest.approx(together[0])


def test_large_vocabularies_do_not_overflow():
    high = 200_000
    documents = [np.array([high, *(d[1:] + 100_000)]) for d in corpus(4)]
    small = KneserNey(corpus(4), VOCAB, BOS).log_probs(corpus(4))
    large = KneserNey(documents, high + 1, high).log_probs(documents)
    assert max(np.abs(a - b).max() for a, b in zip(small, large)) < 5  # only the uniform share differs
    assert KneserNey(documents, high + 1, high).num_ngrams == KneserNey(corpus(4), VOCAB, BOS).num_ngrams


def test_refusals():
    for documents, order in (([], 5), ([np.array([BOS])], 5), (corpus(0), 0)):
        with pytest.raises(UserError):
            KneserNey(documents, VOCAB, BOS, order)
