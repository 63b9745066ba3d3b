"""A tiny model and its tokenizer, which needs several tokens for most characters outside ASCII."""

import pytest

from headspring.inference import LanguageModel
from headspring.tokenization.tokenizer import Tokenizer
from headspring.tokenization.train import TokenizerConfig, train_tokenizer

from .tiny import TEXT, tiny_model


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXT, TokenizerConfig(vocab_size=300))


@pytest.fixture(scope="session")
def lm(tokenizer) -> LanguageModel:
    return LanguageModel(tiny_model(tokenizer.vocab_size), tokenizer)
