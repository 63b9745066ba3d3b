"""Decoders that know the order of their tokens in other ways than RoPE alone, and the first Transformer's decoder half."""

from headspring.models.attention import Attention
from headspring.models.block import Block, Branch, repeat
from headspring.models.decoder import Decoder
from headspring.models.embedding import Embed
from headspring.models.families.registry import family
from headspring.models.feedforward import MLP, Gated
from headspring.models.mask import Causal
from headspring.models.norm import LayerNorm, RMSNorm
from headspring.models.position import (
    ALiBi,
    Learned,
    Linear,
    Llama3,
    NoPE,
    Position,
    RoPE,
    SharedBias,
    Sinusoidal,
    T5Bias,
    YaRN,
)


def _layer(position: Position, heads: int = 3, **settings) -> Block:
    """Pre-norm LayerNorm and a biased GELU MLP."""
    attention = Attention(heads=heads, position=position, qk_norm=None, bias=True, out_bias=True, **settings)
    mlp = MLP(hidden=40, activation="gelu_tanh", bias=True)
    return Block(mixer=Branch(f=attention, pre=LayerNorm()), feedforward=Branch(f=mlp, pre=LayerNorm()))


@family("gpt2")
def gpt2() -> Decoder:
    """GPT-2: learned positions."""
    embed = Embed(positions=Learned())
    return Decoder(vocab=53, width=24, layers=repeat(2, _layer(NoPE())), context=48, norm=LayerNorm(), embed=embed)


@family("bloom")
def bloom() -> Decoder:
    """BLOOM (arXiv 2211.05100): ALiBi with a number of heads that is no power of two, a norm on the embeddings."""
    layers = (_layer(ALiBi(), head_dim=6), _layer(ALiBi(), heads=4, mask=Causal(window=7)))
    return Decoder(vocab=53, width=24, layers=layers, context=48, norm=LayerNorm(), embed=Embed(norm=LayerNorm()))


@family("t5_bias")
def t5_bias() -> Decoder:
    """T5's relative bias in a decoder: a table in the first layer that the second reads; no 1/√d; GeGLU, no biases."""

    def block(position: Position) -> Block:
        attention = Attention(heads=3, kv_heads=1, head_dim=7, position=position, qk_norm=None, scale=1.0)
        return Block(mixer=attention, feedforward=Gated(hidden=40, activation="gelu_tanh"))

    table = T5Bias(buckets=8, max_distance=20)
    return Decoder(vocab=53, width=24, layers=(block(table), block(SharedBias())), context=48)


@family("stretched_rope")
def stretched_rope() -> Decoder:
    """Rotations of a part of each head, stretched in three ways; RMSNorm stored minus one; a norm without a gain."""

    def block(position: Position) -> Block:
        norm = RMSNorm(plus_one=True)
        attention = Attention(heads=2, head_dim=10, position=position, qk_norm=RMSNorm(gain=False))
        return Block(mixer=Branch(f=attention, pre=norm), feedforward=Branch(f=Gated(hidden=40, bias=True), pre=norm))

    yarn = YaRN(factor=4.0, original_context=12, beta_fast=4.0)
    llama3 = Llama3(factor=4.0, original_context=12)
    positions = (RoPE(fraction=0.45, scaling=Linear(factor=3.0)), RoPE(scaling=yarn), RoPE(fraction=0.6, scaling=llama3))
    layers = tuple(block(position) for position in positions)
    return Decoder(vocab=53, width=24, layers=layers, context=48, norm=LayerNorm(gain=False, bias=False))


@family("opt")
def opt() -> Decoder:
    """OPT-350m (arXiv 2205.01068): norms after the sum, embeddings narrower than the stream, positions from row 2 on."""
    block = _layer(NoPE())
    mixer, mlp = (Branch(f=branch.f, pre=None, out=LayerNorm()) for branch in block.branches)
    embed = Embed(inner=10, positions=Learned(offset=2))
    layers = repeat(2, Block(mixer=mixer, feedforward=mlp))
    return Decoder(vocab=53, width=24, layers=layers, context=48, norm=None, embed=embed)


@family("vaswani_decoder")
def vaswani_decoder() -> Decoder:
    """The decoder half of the first Transformer (arXiv 1706.03762): norms after the sum, sinusoids, ReLU, √width."""
    attention = Attention(heads=4, position=NoPE(), qk_norm=None)
    mixer = Branch(f=attention, pre=None, out=LayerNorm())
    mlp = Branch(f=MLP(hidden=40, activation="relu", bias=True), pre=None, out=LayerNorm())
    embed = Embed(scale=24**0.5, positions=Sinusoidal())
    return Decoder(
        vocab=53, width=24, layers=repeat(2, Block(mixer=mixer, feedforward=mlp)), context=48, norm=None, embed=embed
    )
