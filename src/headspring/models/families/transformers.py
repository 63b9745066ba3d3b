"""Decoder-only Transformers: the default, the Llama line, and what no Llama has."""

from headspring.models.attention import Attention
from headspring.models.block import Block, Branch, repeat
from headspring.models.decoder import Decoder
from headspring.models.families.registry import family
from headspring.models.feedforward import MLP, SwiGLU
from headspring.models.norm import LayerNorm, RMSNorm
from headspring.models.position import NoPE, RoPE


@family("transformer")
def transformer() -> Decoder:
    """The house's default (and Qwen3): grouped heads, QK-norm, RoPE, SwiGLU, RMSNorm, tied."""
    block = Block(mixer=Attention(heads=4, kv_heads=2), feedforward=SwiGLU(hidden=40))
    return Decoder(vocab=53, width=24, layers=repeat(2, block), context=48)


@family("llama")
def llama() -> Decoder:
    """Llama (arXiv 2302.13971): a head for every key and value, no QK-norm, an output matrix of its own."""
    norm = RMSNorm(epsilon=1e-5)
    attention = Attention(heads=3, position=RoPE(theta=500.0), qk_norm=None)
    block = Block(mixer=Branch(f=attention, pre=norm), feedforward=Branch(f=SwiGLU(hidden=40), pre=norm))
    return Decoder(vocab=53, width=24, layers=repeat(2, block), context=48, norm=norm, tied=False)


@family("qwen2")
def qwen2() -> Decoder:
    """Qwen2 (arXiv 2407.10671): biases on queries, keys and values; one key–value head."""
    block = Block(mixer=Attention(heads=2, kv_heads=1, qk_norm=None, bias=True), feedforward=SwiGLU(hidden=40))
    return Decoder(vocab=53, width=24, layers=repeat(2, block), context=48)


@family("nope_mlp")
def nope_mlp() -> Decoder:
    """What no Llama has: no positions (arXiv 2305.19466), LayerNorm, a biased GELU MLP, norms before, after and outside."""
    attention = Attention(heads=2, head_dim=10, position=NoPE(), qk_norm=None, bias=True)
    mixer = Branch(f=attention, pre=LayerNorm(), post=RMSNorm())
    feedforward = Branch(f=MLP(hidden=40, activation="gelu", bias=True), pre=None, out=LayerNorm(bias=False))
    block = Block(mixer=mixer, feedforward=feedforward)
    return Decoder(vocab=53, width=24, layers=repeat(2, block), context=48, norm=LayerNorm(), tied=False)


@family("mixed_positions")
def mixed_positions() -> Decoder:
    """Layers that differ: rotary ones, then one without positions (arXiv 2501.18795), then a squared-ReLU MLP (2109.08668)."""
    rotary = Block(mixer=Attention(heads=2, head_dim=8), feedforward=SwiGLU(hidden=40))
    without = Block(mixer=Attention(heads=4, kv_heads=1, head_dim=6, position=NoPE()), feedforward=MLP(hidden=40))
    return Decoder(vocab=53, width=24, layers=(rotary, without, rotary), context=48)
