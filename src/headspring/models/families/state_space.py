"""Recurrences that train in parallel: state spaces, linear attention, delta rules, and hybrids of them with attention."""

from headspring.models.attention import Attention
from headspring.models.block import Block, pattern, repeat
from headspring.models.decoder import Decoder
from headspring.models.delta import GatedDelta
from headspring.models.families.registry import family
from headspring.models.feedforward import MLP, SwiGLU
from headspring.models.gated_linear import GatedLinear
from headspring.models.linear_attention import Favor, LinearAttention
from headspring.models.mamba import Mamba
from headspring.models.mamba2 import Mamba2
from headspring.models.position import NoPE


@family("mamba")
def mamba() -> Decoder:
    """Mamba (arXiv 2312.00752): its blocks have no feed-forward part."""
    return Decoder(vocab=53, width=24, layers=repeat(2, Block(mixer=Mamba(state=5, rank=3))), context=48)


@family("mamba2")
def mamba2() -> Decoder:
    """Mamba-2 (arXiv 2405.21060), in two groups, with chunks shorter than the tests' sequences."""
    mixer = Mamba2(state=5, head_dim=12, groups=2, conv=3, epsilon=1e-6, chunk=4)
    return Decoder(vocab=53, width=24, layers=repeat(2, Block(mixer=mixer)), context=48, tied=False)


@family("linear_attention")
def linear_attention() -> Decoder:
    """Linear attention with elu + 1 (arXiv 2006.16236), in chunks of an odd size."""
    block = Block(mixer=LinearAttention(heads=3, chunk=5), feedforward=MLP(hidden=40, activation="gelu"))
    return Decoder(vocab=53, width=24, layers=repeat(2, block), context=48)


@family("performer")
def performer() -> Decoder:
    """FAVOR+ (arXiv 2009.14794)."""
    mixer = LinearAttention(heads=2, head_dim=10, features=Favor(count=13, seed=3), chunk=4)
    return Decoder(vocab=53, width=24, layers=repeat(2, Block(mixer=mixer, feedforward=MLP(hidden=40))), context=48)


@family("gated_delta")
def gated_delta() -> Decoder:
    """Gated delta nets (arXiv 2412.06464), with values wider than keys."""
    block = Block(mixer=GatedDelta(heads=3, head_dim=6, value_dim=7, chunk=4), feedforward=SwiGLU(hidden=40))
    return Decoder(vocab=53, width=24, layers=repeat(2, block), context=48)


@family("griffin")
def griffin() -> Decoder:
    """Griffin (arXiv 2402.19427): two gated linear recurrences, then one attention layer."""
    recurrent = Block(mixer=GatedLinear(hidden=30, blocks=3), feedforward=MLP(hidden=40, activation="gelu_tanh"))
    attention = Block(mixer=Attention(heads=2, kv_heads=1, qk_norm=None), feedforward=MLP(hidden=40, activation="gelu_tanh"))
    return Decoder(vocab=53, width=24, layers=pattern("RRA", R=recurrent, A=attention), context=48)


@family("jamba")
def jamba() -> Decoder:
    """Jamba (arXiv 2403.19887): Mamba, Mamba, and attention without positions."""
    state_space = Block(mixer=Mamba(state=4), feedforward=SwiGLU(hidden=40))
    attention = Block(mixer=Attention(heads=4, kv_heads=2, position=NoPE(), qk_norm=None), feedforward=SwiGLU(hidden=40))
    return Decoder(vocab=53, width=24, layers=pattern("MMA", M=state_space, A=attention), context=48)
