"""Tokenization: the first compression, and the alphabet that every later stage thinks in."""

from headspring.tokenization.rendering import Rendered
from headspring.tokenization.stream import StreamDecoder
from headspring.tokenization.tokenizer import Tokenizer
from headspring.tokenization.train import TokenizerConfig, train_tokenizer

__all__ = ["Rendered", "StreamDecoder", "Tokenizer", "TokenizerConfig", "train_tokenizer"]
