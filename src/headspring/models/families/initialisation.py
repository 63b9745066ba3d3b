"""Decoders whose start is part of their design: DeepNorm's stream and μP's factors."""

from headspring.models.attention import Attention
from headspring.models.block import Block, repeat
from headspring.models.decoder import Decoder
from headspring.models.families.registry import family
from headspring.models.feedforward import MLP
from headspring.models.initialisation import DeepNorm, deepnorm, mup

BLOCK = Block(mixer=Attention(heads=3, qk_norm=None), feedforward=MLP(hidden=40, activation="relu", bias=True))


@family("deepnorm")
def deepnorm_decoder() -> Decoder:
    """DeepNorm (arXiv 2203.00555): norms after the sum, a stream that is multiplied."""
    return Decoder(vocab=53, width=24, layers=deepnorm(repeat(2, BLOCK)), context=48, norm=None, init=DeepNorm())


@family("mup")
def mup_decoder() -> Decoder:
    """μP (arXiv 2203.03466): scores / d, logits and rates by width."""
    return mup(Decoder(vocab=53, width=24, layers=repeat(2, BLOCK), context=48), base_width=12, base_head_dim=4)
