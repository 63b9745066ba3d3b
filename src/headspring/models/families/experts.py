"""Mixtures of experts: Mixtral, Qwen3-MoE, Qwen2-MoE's shared expert, Switch with a capacity, GPT-OSS's experts."""

from headspring.models.attention import Attention
from headspring.models.block import Block, repeat
from headspring.models.decoder import Decoder
from headspring.models.families.registry import family
from headspring.models.feedforward import SwiGLU
from headspring.models.mask import Causal
from headspring.models.mla import MLA
from headspring.models.moe import Clamp, MoE
from headspring.models.position import RoPE, YaRN
from headspring.models.routing import SigmoidRouter, SoftmaxRouter


@family("mixtral")
def mixtral() -> Decoder:
    """Mixtral (arXiv 2401.04088): two of the experts for every token, their weights with sum 1."""
    block = Block(mixer=Attention(heads=3, kv_heads=1, qk_norm=None), feedforward=MoE(experts=5, top=2, hidden=20))
    return Decoder(vocab=53, width=24, layers=repeat(2, block), context=48, tied=False)


@family("qwen_moe")
def qwen_moe() -> Decoder:
    """Qwen3-MoE (arXiv 2505.09388) and the gated shared expert of Qwen2-MoE; softmax weights as they are."""
    attention = Attention(heads=4, kv_heads=2)
    experts = MoE(experts=6, top=3, hidden=12, router=SoftmaxRouter(renormalise=False), shared=20, shared_gate=True)
    layers = (Block(mixer=attention, feedforward=SwiGLU(hidden=40)), Block(mixer=attention, feedforward=experts))
    return Decoder(vocab=53, width=24, layers=layers, context=48)


@family("switch")
def switch() -> Decoder:
    """Switch (arXiv 2101.03961): one expert for each token, which has room for 1.5 times its share of a row."""
    experts = MoE(experts=4, top=1, hidden=40, router=SoftmaxRouter(renormalise=False), capacity=1.5)
    return Decoder(vocab=53, width=24, layers=repeat(2, Block(mixer=Attention(heads=2), feedforward=experts)), context=48)


@family("deepseek")
def deepseek() -> Decoder:
    """DeepSeek-V3 (arXiv 2412.19437): latent attention; a dense first layer, then experts in groups by sigmoids, with a
    correction, beside a shared one."""
    mixer = MLA(heads=3, head_dim=10, rotary_dim=4, value_dim=6, latent=14, query_latent=18)
    router = SigmoidRouter(groups=4, top_groups=2, scale=2.5)
    experts = MoE(experts=8, top=3, hidden=12, router=router, shared=20)
    layers = (Block(mixer=mixer, feedforward=SwiGLU(hidden=40)), Block(mixer=mixer, feedforward=experts))
    return Decoder(vocab=53, width=24, layers=layers, context=48, tied=False)


@family("deepseek_lite")
def deepseek_lite() -> Decoder:
    """DeepSeek-V2-Lite (arXiv 2405.04434): queries without a latent, biases; a latent so short that decoding absorbs."""
    mixer = MLA(heads=4, head_dim=6, rotary_dim=2, latent=5, bias=True)
    return Decoder(vocab=53, width=24, layers=repeat(2, Block(mixer=mixer, feedforward=SwiGLU(hidden=40))), context=48)


@family("gpt_oss")
def gpt_oss() -> Decoder:
    """GPT-OSS (arXiv 2508.10925): a sink for every head, windows in turn, biases everywhere, clamped experts, YaRN."""
    yarn = YaRN(factor=4.0, original_context=12, truncate=False)
    settings = {"heads": 4, "kv_heads": 2, "position": RoPE(theta=500.0, scaling=yarn), "qk_norm": None, "sink": True}
    everywhere = Attention(**settings, bias=True, out_bias=True)
    near = everywhere.model_copy(update={"mask": Causal(window=6)})
    experts = MoE(experts=4, top=2, hidden=20, router=SoftmaxRouter(bias=True), bias=True, clamp=Clamp(limit=2.0))
    layers = (Block(mixer=near, feedforward=experts), Block(mixer=everywhere, feedforward=experts))
    return Decoder(vocab=53, width=24, layers=layers, context=48, tied=False)
