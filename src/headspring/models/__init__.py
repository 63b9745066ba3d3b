"""Models: a typed tree of values that builds one `torch.nn.Module`, for training, serving and inspection alike."""

from headspring.models.attention import Attention
from headspring.models.audio import Sound
from headspring.models.block import Block, Branch, pattern, repeat
from headspring.models.chosen import Hashed, Routed
from headspring.models.cross_attention import CrossAttention
from headspring.models.decoder import Decoder
from headspring.models.delta import GatedDelta
from headspring.models.early_exit import exit_after
from headspring.models.embedding import Embed, Head
from headspring.models.encoder import Encoder
from headspring.models.encoder_decoder import EncoderDecoder
from headspring.models.feedforward import MLP, Gated, SwiGLU
from headspring.models.folder import load_model, save_model
from headspring.models.gated_linear import GatedLinear
from headspring.models.heads import Classifier, Headed, MultiToken, ValueHead
from headspring.models.initialisation import GPT2, DeepNorm, FanIn, MuP, ZeroOutput, deepnorm, mup
from headspring.models.linear_attention import EluPlusOne, Favor, LinearAttention
from headspring.models.mamba import Mamba
from headspring.models.mamba2 import Mamba2
from headspring.models.mask import Causal, Full, LocalGlobal, Strided
from headspring.models.mla import MLA
from headspring.models.moe import MoE
from headspring.models.multimodal import Multimodal
from headspring.models.neural_ngram import NeuralNGram
from headspring.models.ngram import NGram
from headspring.models.norm import LayerNorm, RMSNorm
from headspring.models.position import (
    ALiBi,
    DynamicNTK,
    Learned,
    Linear,
    Llama3,
    LongRoPE,
    NoPE,
    RoPE,
    SharedBias,
    Sinusoidal,
    T5Bias,
    YaRN,
)
from headspring.models.recurrent import GRU, LSTM, RNN
from headspring.models.routing import SigmoidRouter, SoftmaxRouter
from headspring.models.vision import Vision

__all__ = [
    "GPT2",
    "GRU",
    "LSTM",
    "MLA",
    "MLP",
    "RNN",
    "ALiBi",
    "Attention",
    "Block",
    "Branch",
    "Causal",
    "Classifier",
    "CrossAttention",
    "Decoder",
    "DeepNorm",
    "DynamicNTK",
    "EluPlusOne",
    "Embed",
    "Encoder",
    "EncoderDecoder",
    "FanIn",
    "Favor",
    "Full",
    "Gated",
    "GatedDelta",
    "GatedLinear",
    "Hashed",
    "Head",
    "Headed",
    "LayerNorm",
    "Learned",
    "Linear",
    "LinearAttention",
    "Llama3",
    "LocalGlobal",
    "LongRoPE",
    "Mamba",
    "Mamba2",
    "MoE",
    "MuP",
    "MultiToken",
    "Multimodal",
    "NGram",
    "NeuralNGram",
    "NoPE",
    "RMSNorm",
    "RoPE",
    "Routed",
    "SharedBias",
    "SigmoidRouter",
    "Sinusoidal",
    "SoftmaxRouter",
    "Sound",
    "Strided",
    "SwiGLU",
    "T5Bias",
    "ValueHead",
    "Vision",
    "YaRN",
    "ZeroOutput",
    "deepnorm",
    "exit_after",
    "load_model",
    "mup",
    "pattern",
    "repeat",
    "save_model",
]
