"""n-gram language models: counted, smoothed, read and written as ARPA files, and asked like any other model."""

from headspring.models.ngram.model import NGram, NGramModule

__all__ = ["NGram", "NGramModule"]
