"""Decoder-only families that differ from Llama in more than a setting: branches at once, shared norms, norms on both sides."""

from headspring.models.attention import Attention
from headspring.models.block import Block, Branch, repeat
from headspring.models.decoder import Decoder
from headspring.models.embedding import Embed, Head
from headspring.models.families.registry import family
from headspring.models.feedforward import MLP, Gated
from headspring.models.mask import Causal
from headspring.models.norm import LayerNorm, RMSNorm
from headspring.models.position import RoPE


@family("gpt_neox")
def gpt_neox() -> Decoder:
    """GPT-NeoX (arXiv 2204.06745) and Pythia: both branches read the stream at once, half of each head rotates."""
    norm = LayerNorm()
    attention = Attention(heads=3, position=RoPE(fraction=0.5), qk_norm=None, bias=True, out_bias=True)
    feedforward = Branch(f=MLP(hidden=40, activation="gelu", bias=True), pre=norm)
    block = Block(mixer=Branch(f=attention, pre=norm), feedforward=feedforward, parallel=True)
    return Decoder(vocab=53, width=24, layers=repeat(2, block), context=48, norm=norm, tied=False)


@family("falcon")
def falcon() -> Decoder:
    """Falcon-7B (arXiv 2311.16867): one norm for both branches, one key–value head."""
    attention = Attention(heads=3, kv_heads=1, qk_norm=None)
    feedforward = Branch(f=MLP(hidden=40, activation="gelu"), pre=None)
    block = Block(mixer=Branch(f=attention, pre=None), feedforward=feedforward, parallel=True, pre=LayerNorm())
    return Decoder(vocab=53, width=24, layers=repeat(2, block), context=48, norm=LayerNorm())


def gemma(attention: Attention) -> Block:
    """Norms before and after each branch, their gains stored minus one."""
    norm = RMSNorm(plus_one=True)
    feedforward = Gated(hidden=40, activation="gelu_tanh")
    return Block(mixer=Branch(f=attention, pre=norm, post=norm), feedforward=Branch(f=feedforward, pre=norm, post=norm))


@family("gemma2")
def gemma2() -> Decoder:
    """Gemma 2 (arXiv 2408.00118): bounded scores and logits, a window in every second layer, scaled embeddings."""
    local, whole = (
        gemma(Attention(heads=4, kv_heads=2, head_dim=10, qk_norm=None, scale=0.25, softcap=5.0, mask=Causal(window=window)))
        for window in (5, None)
    )
    ends = {"norm": RMSNorm(plus_one=True), "embed": Embed(scale=24**0.5), "head": Head(softcap=9.0)}
    return Decoder(vocab=53, width=24, layers=(local, whole), context=48, **ends)


@family("gemma3")
def gemma3() -> Decoder:
    """Gemma 3 (arXiv 2503.19786): normalised queries and keys, another rotary base in layers with a window."""
    norm = RMSNorm(plus_one=True)
    local, whole = (
        gemma(
            Attention(
                heads=4, kv_heads=1, head_dim=8, qk_norm=norm, scale=0.5, mask=Causal(window=window), position=RoPE(theta=theta)
            )
        )
        for window, theta in ((5, 100.0), (None, 1e4))
    )
    return Decoder(vocab=53, width=24, layers=(local, whole), context=48, norm=norm, embed=Embed(scale=24**0.5))
