"""A world small enough that a test takes a second: documents, a tokenizer, tasks, models and a data folder."""

from functools import cache

import pytest
import torch

from headspring.artifacts import progress
from headspring.data.shards import TokensConfig, write_tokens
from headspring.data.store import Row, write_documents
from headspring.data.tasks import Task, TaskConfig, mine
from headspring.models import Attention, Block, Decoder, SwiGLU, repeat, save_model
from headspring.text.documents import Document
from headspring.tokenization.tokenizer import Tokenizer
from headspring.tokenization.train import TokenizerConfig, train_tokenizer

WORDS = ["red", "green", "blue", "cold", "warm", "small", "large", "first", "last", "open", "read", "write", "load"]
SPLITS = ("train", "validation", "train", "validation", "train", "validation", "train")


def source(index: int) -> str:
    """A module with two functions whose names and parameters depend on `index`."""
    first, second, third = (WORDS[(index * step + step) % len(WORDS)] for step in (1, 3, 5))
    return (
        f'def {first}_{second}{index}(self, {second}, {third}={index}):\n    """Set the {first} {second} value."""\n'
        f"    if {second}:\n        raise ValueError({third})\n    return {second} + {third}\n\n\n"
        f'def {third}{index}({first}):\n    """Return a {third} {first} thing."""\n    return {first} * {index}\n'
    )


@cache
def _documents() -> tuple[Document, ...]:
    texts = [source(index) for index in range(84)]
    return tuple(Document(text, "tiny", "code", f"m{i}.py", 0, len(text.encode())) for i, text in enumerate(texts))


@cache
def _tokenizer() -> Tokenizer:
    return train_tokenizer([item.text for item in _documents()], TokenizerConfig(vocab_size=400))


class World:
    """What the tests of this folder share; everything is made once."""

    def documents(self) -> tuple[Document, ...]:
        return _documents()

    def tokenizer(self) -> Tokenizer:
        return _tokenizer()

    def tasks(self, seed: int = 0, **config) -> list[Task]:
        return mine(self.documents(), TaskConfig(**{"per_kind": 40, **config}), seed)

    def model(self, width: int = 32, layers: int = 2, seed: int = 0, context: int = 256):
        block = Block(mixer=Attention(heads=2), feedforward=SwiGLU(hidden=2 * width))
        vocab = self.tokenizer().vocab_size
        model = Decoder(vocab=vocab, width=width, layers=repeat(layers, block), context=context).build(seed)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():  # some start at zero, and a branch that adds nothing can hide a bug
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        return model

    def save(self, model, folder):
        save_model(model, folder)
        self.tokenizer().save(folder)
        return folder

    def data_folder(self, folder):
        rows = [Row(item, SPLITS[index % len(SPLITS)]) for index, item in enumerate(self.documents())]
        write_documents(rows, folder)
        return folder

    def tokens_folder(self, data_folder, folder):
        write_tokens(TokensConfig(), data_folder, self.tokenizer(), folder)
        return folder


@pytest.fixture(scope="session")
def world() -> World:
    return World()


@pytest.fixture(autouse=True)
def _quiet():
    with progress.quiet():
        yield
