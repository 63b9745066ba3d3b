"""Models: a typed tree of values that builds one `torch.nn.Module`, for training, serving and inspection alike."""

from headspring.models.attention import Attention
from headspring.models.block import Block, Branch, repeat
from headspring.models.decoder import Decoder
from headspring.models.feedforward import MLP, SwiGLU
from headspring.models.folder import load_model, save_model
from headspring.models.norm import LayerNorm, RMSNorm
from headspring.models.position import NoPE, RoPE

__all__ = [
    "MLP",
    "Attention",
    "Block",
    "Branch",
    "Decoder",
    "LayerNorm",
    "NoPE",
    "RMSNorm",
    "RoPE",
    "SwiGLU",
    "load_model",
    "repeat",
    "save_model",
]
