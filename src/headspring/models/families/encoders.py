"""Encoders: the house's default stack, BERT's, RoBERTa's, and ModernBERT's with its local and global layers."""

from headspring.models.attention import Attention
from headspring.models.block import Block, Branch, repeat
from headspring.models.embedding import Embed, Head
from headspring.models.encoder import Encoder
from headspring.models.families.registry import family
from headspring.models.feedforward import MLP, Gated, SwiGLU
from headspring.models.mask import Full
from headspring.models.norm import LayerNorm
from headspring.models.position import Learned, NoPE, RoPE
from headspring.models.transform import Transform


@family("encoder")
def encoder() -> Encoder:
    """The house's default stack, reading both ways: RoPE, SwiGLU, RMSNorm, QK-norm, tied."""
    block = Block(mixer=Attention(heads=4, kv_heads=2, mask=Full()), feedforward=SwiGLU(hidden=40))
    return Encoder(vocab=53, width=24, layers=repeat(2, block), context=48)


@family("bert")
def bert() -> Encoder:
    """BERT (arXiv 1810.04805): post-norm, learned positions, two types of tokens, biases, a transform before its head."""
    return bert_like(offset=0, types=2)


@family("roberta")
def roberta() -> Encoder:
    """RoBERTa (arXiv 1907.11692): positions that begin after the pad's row, one type."""
    return bert_like(offset=2, types=1)


def bert_like(offset: int, types: int) -> Encoder:
    norm = LayerNorm(epsilon=1e-12)
    attention = Attention(heads=3, position=NoPE(), mask=Full(), qk_norm=None, bias=True, out_bias=True)
    feedforward = MLP(hidden=40, activation="gelu", bias=True)
    block = Block(mixer=Branch(f=attention, pre=None, out=norm), feedforward=Branch(f=feedforward, pre=None, out=norm))
    return Encoder(
        vocab=53,
        width=24,
        layers=repeat(2, block),
        context=48,
        norm=None,
        embed=Embed(positions=Learned(offset=offset), types=types, norm=norm),
        head=Head(bias=True, transform=Transform(norm=norm)),
    )


@family("modernbert")
def modernbert() -> Encoder:
    """ModernBERT (arXiv 2412.13663): RoPE of two bases, GeGLU, local layers between global ones, hardly any biases."""
    norm = LayerNorm(bias=False)
    feedforward = Branch(f=Gated(hidden=36, activation="gelu"), pre=norm)
    everywhere = Attention(heads=3, position=RoPE(theta=160_000.0), mask=Full(), qk_norm=None)
    nearby = Attention(heads=3, mask=Full(window=3), qk_norm=None)
    first = Block(mixer=Branch(f=everywhere, pre=None), feedforward=feedforward)
    local = Block(mixer=Branch(f=nearby, pre=norm), feedforward=feedforward)
    last = Block(mixer=Branch(f=everywhere, pre=norm), feedforward=feedforward)
    head = Head(bias=True, transform=Transform(norm=norm, bias=False))
    return Encoder(vocab=53, width=24, layers=(first, local, last), context=48, norm=norm, embed=Embed(norm=norm), head=head)
