"""Masked language modelling on the loop: it learns, it is measured, and the wrong pairings are refused."""

import numpy as np
import pytest
import torch

from headspring.artifacts import UserError
from headspring.data.batch import IGNORE, Sample, collate
from headspring.data.masking import MaskedSamples, Masking
from headspring.models import Attention, Block, Encoder, Full, SwiGLU, repeat
from headspring.tokenization.train import TokenizerConfig, train_tokenizer
from headspring.training.loop import train
from headspring.training.masked import MaskedTokens, masked_validation
from headspring.training.objective import NextToken
from headspring.training.optimizers import AdamW
from headspring.training.pretrain import PretrainConfig, Transformer, plan
from tests.training.conftest import config

LENGTH = 24


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a few words to count bytes of"] * 3, TokenizerConfig(vocab_size=270, mask=True))


class Counting:
    """Rows that count up from anywhere: a hidden token follows from its neighbours on either side."""

    sequence_length = LENGTH

    def sample(self, index: int) -> Sample:
        tokens = (np.random.default_rng(index).integers(0, 20) + np.arange(LENGTH)) % 20
        return Sample(tokens, np.roll(tokens, -1), np.zeros(LENGTH, np.int32))

    def where(self, document_id):
        return []


def encoder(vocab: int) -> Encoder:
    block = Block(mixer=Attention(heads=4, mask=Full()), feedforward=SwiGLU(hidden=64))
    return Encoder(vocab=vocab, width=32, layers=repeat(2, block), context=LENGTH)


def test_it_learns_what_stands_on_both_sides(tokenizer, tmp_path):
    data = MaskedSamples(Counting(), tokenizer, Masking(share=0.2), seed=0)
    model = encoder(tokenizer.vocab_size).build(seed=1)
    measure = masked_validation(model, MaskedSamples(Counting(), tokenizer, Masking(), 1), 32, 16, torch.float32, False)
    before = measure()
    settings = config(steps=60, batch_size=16, compile="never", optimizer=AdamW(learning_rate=1e-2))
    train(model, MaskedTokens(), data, settings, tmp_path)
    after = measure()
    assert before["accuracy"] < 0.1 < 0.6 < after["accuracy"] and after["loss"] < before["loss"] - 2
    assert measure() == after  # the same tokens are hidden every time


def test_only_hidden_tokens_count(tokenizer):
    data = MaskedSamples(Counting(), tokenizer, Masking(), seed=0)
    batch = collate([data.sample(i) for i in range(3)], document_mask=False)
    model = encoder(tokenizer.vocab_size).build()
    objective = MaskedTokens()
    assert objective.count(batch) == int((batch.targets != IGNORE).sum()) == 3 * round(0.15 * LENGTH)
    logits = model.logits(model(batch.inputs)).double().log_softmax(-1)
    places = batch.targets != IGNORE
    expected = -logits[places].gather(1, batch.targets[places][:, None]).sum()
    torch.testing.assert_close(objective.loss(model, batch)[0], expected.float())


def test_an_encoder_is_not_trained_on_the_next_token(tokenizer):
    batch = collate([Counting().sample(0)], document_mask=False)
    with pytest.raises(UserError, match="'encoder' sees the next token and cannot be trained to predict it"):
        NextToken().loss(encoder(tokenizer.vocab_size).build(), batch)


def test_the_recipe_says_which(tokenizer):
    small = Transformer(width=32, depth=1, heads=2, context=16)
    masked = PretrainConfig(model=small, objective="masked", steps=2, batch_size=2, precision="fp32")
    assert not masked.described(50).causal and PretrainConfig(model=small).described(50).causal
    assert plan(masked, 300)["parameters"] == plan(masked.model_copy(update={"objective": "next_token"}), 300)["parameters"]
    with pytest.raises(ValueError, match="masking belongs to objective: masked"):
        PretrainConfig(masking=Masking())
