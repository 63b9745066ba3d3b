"""What a neural model knows that counting does not (Bengio et al. 2003): that words are alike.

The language has sentences `bos adjective noun`. Adjectives and nouns come in classes that nothing names; any adjective goes
with any noun of its class. A part of the pairs is never shown. Counting has nothing on such a pair and falls back on how
common the noun is; a network whose vectors are too narrow to hold every pair has to place words of a class together.
"""

import math

import numpy as np
import pytest
import torch

from headspring.data.batch import Sample
from headspring.models import Block, Branch, Decoder
from headspring.models.neural_ngram import NeuralNGram
from headspring.models.ngram import NGram
from headspring.models.scoring import log_probs
from headspring.training import loop
from headspring.training.config import TrainConfig
from headspring.training.objective import NextToken
from headspring.training.optimizers import AdamW

CLASSES, WORDS = 4, 8
ADJECTIVES = 1 + np.arange(CLASSES * WORDS)  # token 0 is bos
NOUNS = ADJECTIVES + CLASSES * WORDS
VOCAB = 1 + 2 * CLASSES * WORDS


def pairs() -> tuple[np.ndarray, np.ndarray]:
    """(P, 3) sentences that are shown, and those that are not: two nouns of every adjective's eight."""
    shown, hidden = [], []
    for word, adjective in enumerate(ADJECTIVES):
        first, own = word // WORDS * WORDS, word % WORDS
        for noun in range(WORDS):
            kept = (noun - own) % WORDS >= 2
            (shown if kept else hidden).append((0, adjective, NOUNS[first + noun]))
    return np.array(shown), np.array(hidden)


class Sentences:
    """Sentences that are shown, drawn by index."""

    sequence_length = 2

    def __init__(self, shown: np.ndarray):
        self.shown = shown

    def sample(self, index: int) -> Sample:
        sentence = self.shown[np.random.default_rng(index).integers(len(self.shown))].astype(np.int64)
        return Sample(sentence[:-1], sentence[1:], np.zeros(2, dtype=np.int32))

    def where(self, document_id: str) -> list:
        return []


@torch.no_grad()
def perplexity(model, sentences: np.ndarray) -> float:
    """Of the nouns, given bos and adjective."""
    tokens = torch.from_numpy(sentences.astype(np.int64))
    hidden = model(tokens[:, :-1])
    return math.exp(-float(log_probs(model, hidden, tokens[:, 1:])[:, -1].mean()))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A Kneser–Ney model of order 3 that counted, and a neural one of order 3 that was trained on, the same language."""
    shown, _ = pairs()
    data = Sentences(shown)
    counted = NGram(vocab=VOCAB, order=3, bos=0, context=8).build()
    counted.count([np.array([*data.sample(i).inputs, data.sample(i).targets[-1]]) for i in range(4000)])
    network = Branch(f=NeuralNGram(order=3, hidden=32), residual=False)
    neural = Decoder(vocab=VOCAB, width=6, layers=(Block(mixer=network),), context=8, tied=False).build()
    settings = {"steps": 250, "batch_size": 32, "precision": "fp32", "compile": "never", "checkpoint_every": 10**6}
    settings |= {"optimizer": AdamW(learning_rate=0.02, weight_decay=0.0)}
    loop.train(neural, NextToken(), data, TrainConfig(**settings), tmp_path_factory.mktemp("neural"))
    return counted, neural


def test_on_pairs_that_were_never_seen_the_neural_model_is_better(models):
    counted, neural = (perplexity(model, pairs()[1]) for model in models)
    assert neural < 0.7 * counted
    assert neural < 2.5 * WORDS  # it knows the class, but for being surprised; nouns in all are 32


def test_on_pairs_that_were_seen_counting_is_as_good(models):
    """The control: nothing is wrong with the n-gram model where it has something to count."""
    counted, neural = (perplexity(model, pairs()[0]) for model in models)
    assert counted < 1.1 * neural and counted < WORDS


def test_a_network_that_cannot_tell_words_apart_knows_no_more(models):
    """The control of the first test: with the words' vectors in disorder the advantage is gone."""
    counted, neural = models
    broken = Decoder.model_validate(neural.config.model_dump()).build()
    broken.load_state_dict(neural.state_dict())
    with torch.no_grad():
        order = torch.randperm(CLASSES * WORDS, generator=torch.Generator().manual_seed(0))
        broken.embed.weight[1 : 1 + CLASSES * WORDS] = neural.embed.weight[1 + order]
    assert perplexity(broken, pairs()[1]) > perplexity(counted, pairs()[1])
