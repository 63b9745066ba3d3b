"""What the neural model was invented for: a word after a word that it never followed, where words like them have met.

Bengio et al. (2003, section 1): a model that has read "the cat is walking" gives "a dog was running" its due, since similar
words get similar vectors; counts know nothing of likeness, and back off to how common a word is."""

import math

import numpy as np
import pytest
import torch

from headspring.data.batch import Sample
from headspring.models import Block, Decoder, NeuralNGram
from headspring.models.ngram import NGram
from headspring.models.scoring import log_probs
from headspring.training.loop import train
from headspring.training.objective import NextToken
from headspring.training.optimizers import AdamW
from tests.training.conftest import config

BOS, KINDS, FIRSTS, SECONDS = 0, 3, 10, 10
VOCAB = 1 + KINDS * (FIRSTS + SECONDS)


def pairs(shuffled: bool) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Two words of one kind follow each other; half of all such pairs are read, and half are asked for. `shuffled` draws a
    kind of its own for every pair of the second half, so that likeness says nothing."""
    generator = np.random.default_rng(0)
    seen, unseen = [], []
    for kind in range(KINDS):
        for first in range(FIRSTS):
            for number, second in enumerate(generator.permutation(SECONDS)):
                read = number < SECONDS // 2
                other = int(generator.integers(KINDS)) if shuffled and not read else kind
                pair = 1 + kind * FIRSTS + first, 1 + KINDS * FIRSTS + other * SECONDS + int(second)
                (seen if read else unseen).append(pair)
    return seen, unseen


class Pairs:
    """Rows of one document: a beginning and two words."""

    sequence_length = 2

    def __init__(self, found: list[tuple[int, int]]):
        self.found = found

    def sample(self, index: int) -> Sample:
        first, second = self.found[int(np.random.default_rng(index).integers(len(self.found)))]
        return Sample(np.array([BOS, first]), np.array([first, second]), np.zeros(2, np.int32))

    def where(self, document_id):
        return []


@torch.no_grad()
def bits(model, asked: list[tuple[int, int]]) -> float:
    """Of the second word."""
    rows = torch.tensor([[BOS, first] for first, _ in asked])
    targets = torch.tensor([[first, second] for first, second in asked])
    return float(-log_probs(model, model(rows), targets)[:, 1].mean()) / math.log(2)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    seen, _ = pairs(shuffled=False)
    counts = NGram(vocab=VOCAB, order=3, bos=BOS, context=8).build()
    counts.count([np.array([BOS, *pair]) for pair in seen])
    block = Block(mixer=NeuralNGram(order=3, hidden=8))
    neural = Decoder(vocab=VOCAB, width=3, layers=(block,), context=8).build(seed=0)
    settings = config(steps=200, batch_size=64, compile="never", optimizer=AdamW(learning_rate=1e-2))
    train(neural, NextToken(), Pairs(seen), settings, tmp_path_factory.mktemp("neural"))
    return counts, neural


def test_a_neural_model_beats_kneser_ney_on_unseen_combinations(models):
    counts, neural = models
    _, unseen = pairs(shuffled=False)
    assert bits(neural, unseen) < bits(counts, unseen) - 2
    assert bits(neural, unseen) < math.log2(SECONDS) + 1  # it knows the kind of the word that comes


def test_on_combinations_that_it_read_counting_is_as_good(models):
    counts, neural = models
    seen, _ = pairs(shuffled=False)
    assert bits(counts, seen) < math.log2(SECONDS)
    assert bits(neural, seen) < math.log2(SECONDS) + 0.5


def test_where_likeness_says_nothing_the_neural_model_does_not_win(models):
    counts, neural = models
    _, unseen = pairs(shuffled=True)
    assert bits(neural, unseen) > bits(counts, unseen)
