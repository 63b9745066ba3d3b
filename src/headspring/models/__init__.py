"""Models: a typed tree of values that builds one `torch.nn.Module`, for training, serving and inspection alike."""

from headspring.models.attention import Attention
from headspring.models.block import Block, Branch, pattern, repeat
from headspring.models.decoder import Decoder
from headspring.models.embedding import Embed, Head
from headspring.models.feedforward import MLP, SwiGLU
from headspring.models.folder import load_model, save_model
from headspring.models.mask import Causal, Full
from headspring.models.norm import LayerNorm, RMSNorm
from headspring.models.position import NoPE, RoPE

__all__ = [
    "MLP",
    "Attention",
    "Block",
    "Branch",
    "Causal",
    "Decoder",
    "Embed",
    "Full",
    "Head",
    "LayerNorm",
    "NoPE",
    "RMSNorm",
    "RoPE",
    "SwiGLU",
    "load_model",
    "pattern",
    "repeat",
    "save_model",
]
