"""Small tokenizers of every kind, trained once on some of the standard library."""

import argparse
import json
import shutil

import pytest

from headspring.tokenization import Tokenizer, TokenizerConfig, train_tokenizer

MODULES = (argparse, json, shutil)
KINDS = ("bpe", "wordpiece", "unigram")


def source_texts() -> list[str]:
    """About 170 KB of Python source."""
    return [open(module.__file__, encoding="utf-8").read() for module in MODULES]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return source_texts()


@pytest.fixture(scope="session")
def trained(texts: list[str]) -> dict[str, Tokenizer]:
    return {kind: train_tokenizer(texts, TokenizerConfig(kind=kind, vocab_size=1200)) for kind in KINDS}


@pytest.fixture(scope="session")
def bpe(trained: dict[str, Tokenizer]) -> Tokenizer:
    return trained["bpe"]


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, trained: dict[str, Tokenizer]) -> Tokenizer:
    return trained[request.param]
