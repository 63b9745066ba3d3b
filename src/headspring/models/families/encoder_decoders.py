"""Encoder–decoders: the house's default stack, the original Transformer, T5 in both versions, and BART."""

from headspring.models.attention import Attention
from headspring.models.block import Block, Branch, repeat
from headspring.models.cross_attention import CrossAttention
from headspring.models.decoder import Decoder
from headspring.models.embedding import Embed, Head
from headspring.models.encoder import Encoder
from headspring.models.encoder_decoder import EncoderDecoder
from headspring.models.families.registry import family
from headspring.models.feedforward import MLP, FeedForward, Gated, SwiGLU
from headspring.models.mask import Causal, Full
from headspring.models.norm import LayerNorm, RMSNorm
from headspring.models.position import Learned, NoPE, SharedBias, Sinusoidal, T5Bias

SIZES = {"vocab": 53, "width": 24, "context": 48}


@family("encoder_decoder")
def encoder_decoder() -> EncoderDecoder:
    """The house's default stack on both sides, with grouped keys in the cross-attention too, and tables of their own."""
    swiglu = SwiGLU(hidden=40)
    reads = Block(mixer=Attention(heads=4, kv_heads=2, mask=Full()), feedforward=swiglu)
    cross = CrossAttention(heads=4, kv_heads=2)
    writes = Block(mixer=Attention(heads=4, kv_heads=2), cross=cross, feedforward=swiglu)
    return EncoderDecoder(
        encoder=Encoder(**SIZES, layers=(reads,), head=None),
        decoder=Decoder(**SIZES, layers=repeat(2, writes)),
        shared=False,
    )


@family("vaswani")
def vaswani() -> EncoderDecoder:
    """The original Transformer (arXiv 1706.03762): post-norm, sinusoidal positions, embeddings times √D, all tables one."""
    return post_norm(Embed(scale=24**0.5, positions=Sinusoidal()), Head(), activation="relu")


@family("bart")
def bart() -> EncoderDecoder:
    """BART (arXiv 1910.13461): post-norm, learned positions from row 2, a norm over the embeddings, gelu."""
    return post_norm(Embed(positions=Learned(offset=2), norm=LayerNorm()), Head(bias=True), activation="gelu")


def post_norm(embed: Embed, head: Head, activation: str) -> EncoderDecoder:
    plain = {"position": NoPE(), "qk_norm": None, "bias": True, "out_bias": True}

    def branch(f: Attention | CrossAttention | MLP) -> Branch:
        return Branch(f=f, pre=None, out=LayerNorm())

    feedforward = branch(MLP(hidden=40, activation=activation, bias=True))
    cross = branch(CrossAttention(heads=3, qk_norm=None, bias=True, out_bias=True))
    reads = Block(mixer=branch(Attention(heads=3, mask=Full(), **plain)), feedforward=feedforward)
    writes = Block(mixer=branch(Attention(heads=3, mask=Causal(), **plain)), cross=cross, feedforward=feedforward)
    return EncoderDecoder(
        encoder=Encoder(**SIZES, layers=(reads,), norm=None, embed=embed, head=None),
        decoder=Decoder(**SIZES, layers=(writes,), norm=None, embed=embed, head=head),
        start=2,
    )


@family("t5")
def t5() -> EncoderDecoder:
    """T5 (arXiv 1910.10683): one relative bias a stack, no 1/√C, relu, tied with outputs times D^(−1/2)."""
    return t5_like(MLP(hidden=40, activation="relu"), tied=True)


@family("t5_v1_1")
def t5_v1_1() -> EncoderDecoder:
    """T5 version 1.1 (arXiv 2002.05202): gated gelu, a head of its own, no factor."""
    return t5_like(Gated(hidden=36, activation="gelu_tanh"), tied=False)


def t5_like(feedforward: FeedForward, tied: bool) -> EncoderDecoder:
    same = {"heads": 3, "head_dim": 6, "qk_norm": None, "scale": 1.0}
    table, norm = T5Bias(buckets=8, max_distance=20), RMSNorm()

    def layers(mask: Full | Causal, cross: CrossAttention | None) -> tuple[Block, ...]:
        return tuple(
            Block(mixer=Attention(position=position, mask=mask, **same), cross=cross, feedforward=feedforward)
            for position in (table, SharedBias())
        )

    head = Head(scale=SIZES["width"] ** -0.5 if tied else None)
    return EncoderDecoder(
        encoder=Encoder(**SIZES, layers=layers(Full(), None), norm=norm, head=None),
        decoder=Decoder(**SIZES, layers=layers(Causal(), CrossAttention(**same)), norm=norm, head=head, tied=tied),
    )
