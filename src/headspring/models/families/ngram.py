"""The n-gram model: counted, not trained."""

from headspring.models.families.registry import family
from headspring.models.ngram import NGram


@family("ngram")
def ngram() -> NGram:
    """Modified Kneser–Ney over a vocabulary so small that most contexts of three tokens have been seen."""
    return NGram(vocab=9, order=4, bos=0, context=48)
