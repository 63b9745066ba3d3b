"""Attention that reads some of the keys: windows, patterns and choices, with blocks so small that all happens in few tokens."""

from headspring.models.attention import Attention
from headspring.models.block import Block
from headspring.models.chosen import Hashed, Routed
from headspring.models.decoder import Decoder
from headspring.models.families.registry import family
from headspring.models.feedforward import SwiGLU
from headspring.models.mask import Causal, LocalGlobal, Mask, Strided
from headspring.models.position import ALiBi, NoPE, T5Bias


def _decoder(*masks: Mask, **settings) -> Decoder:
    layers = tuple(
        Block(mixer=Attention(heads=4, kv_heads=2, mask=mask, **settings), feedforward=SwiGLU(hidden=40)) for mask in masks
    )
    return Decoder(vocab=53, width=24, layers=layers, context=48)


@family("sliding_window")
def sliding_window() -> Decoder:
    """Windows of two lengths (Mistral, arXiv 2310.06825)."""
    return _decoder(Causal(window=3), Causal(window=4))


@family("window_and_sinks")
def window_and_sinks() -> Decoder:
    """A window and the first tokens (arXiv 2309.17453), with a learned sink and a soft-cap besides."""
    return _decoder(*repeat_mask(Causal(window=3, sinks=1)), sink=True, softcap=5.0)


@family("strided")
def strided() -> Decoder:
    """The strided pattern of Sparse Transformers (arXiv 1904.10509)."""
    return _decoder(Strided(stride=3, local=3), Strided(stride=4, local=3), position=NoPE())


@family("local_global")
def local_global() -> Decoder:
    """A window, a first token and columns that all later tokens see, with a learned bias."""
    return _decoder(LocalGlobal(window=3, globals=1, every=4), LocalGlobal(window=3, every=5), position=T5Bias(buckets=8))


@family("routed")
def routed() -> Decoder:
    """Blocks chosen by pooled queries and keys."""
    return _decoder(*repeat_mask(Routed(block=3, top=1)), position=ALiBi())


@family("hashed")
def hashed() -> Decoder:
    """Blocks that meet in a bucket."""
    return _decoder(*repeat_mask(Hashed(block=3, top=1, buckets=2, rounds=1)))


def repeat_mask(mask: Mask) -> tuple[Mask, Mask]:
    """Two layers alike."""
    return mask, mask
