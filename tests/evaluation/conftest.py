"""A small corpus of real Python, its tokenizer and shards, and an untrained model with opinions."""

import textwrap
from pathlib import Path

import pytest
import torch

from headspring.data.shards import TokensConfig, write_tokens
from headspring.data.store import Row, write_documents
from headspring.inference import LanguageModel
from headspring.models import Attention, Block, Decoder, SwiGLU, repeat, save_model
from headspring.text.documents import Document
from headspring.tokenization.train import TokenizerConfig, train_tokenizer

DOCUMENTED = '''
def triple(number):
    """Three times a number.

    >>> triple(2)
    6
    """
    result = number * 3
    return result


def broken(number):
    """Its doctest is wrong.

    >>> broken(2)
    7
    """
    return number
'''


def module(index: int) -> str:
    """A module of functions; like real ones, no two are alike."""
    body = f'''
        """Module {index}.

        >>> {index} + 1
        {index + 1}
        """

        def area_{index}(width, height={index}):
            """Area of a rectangle number {index}."""
            if width < {index}:
                raise ValueError("too narrow")
            return width * height

        def join_{index}(first, second, separator="-{index}"):
            """Join two words with separator {index}."""
            words = [first, second]
            return separator.join(words)
    '''
    return textwrap.dedent(body).lstrip()


@pytest.fixture(scope="session")
def documents() -> list[Document]:
    texts = [module(i) for i in range(30)]
    found = [Document(text, "code", "code", f"{i}.py") for i, text in enumerate(texts)]
    found.append(Document(DOCUMENTED, "code", "code", "documented.py"))
    return [*found, *(Document(f"Prose number {i}. " * 20, "prose", "prose", f"{i}.txt") for i in range(6))]


@pytest.fixture(scope="session")
def data_folder(documents, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [Row(d, split="test" if i % 3 == 0 else "train") for i, d in enumerate(documents)]
    write_documents(rows, folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(documents):
    return train_tokenizer([document.text for document in documents], TokenizerConfig(vocab_size=400))


@pytest.fixture(scope="session")
def tokens_folder(data_folder, tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    write_tokens(TokensConfig(), data_folder, tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def lm(tokenizer) -> LanguageModel:
    block = Block(mixer=Attention(heads=2), feedforward=SwiGLU(hidden=32))
    model = Decoder(vocab=tokenizer.vocab_size, width=32, layers=repeat(2, block), context=128).build(1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.2, generator=generator)
    return LanguageModel(model, tokenizer)


@pytest.fixture(scope="session")
def model_folder(lm, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(lm.model, folder)
    lm.tokenizer.save(folder)
    return folder
