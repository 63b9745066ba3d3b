"""A tiny model with every property that matters (several layers, grouped heads), and text for a tiny tokenizer."""

import torch

from headspring.models import Attention, Block, Decoder, SwiGLU, repeat

CONTEXT = 96
TEXT = [
    "def add(a, b):\n    return a + b\n",
    "Straße, naïve café, 日本語のテキスト, 🙂🙃 and more.",
    "the quick brown fox jumps over the lazy dog " * 4,
]


def tiny_decoder(vocab: int, **changes) -> Decoder:
    block = Block(mixer=Attention(heads=4, kv_heads=2), feedforward=SwiGLU(hidden=64))
    return Decoder(**{"vocab": vocab, "width": 32, "layers": repeat(2, block), "context": CONTEXT, **changes})


def tiny_model(vocab: int, seed: int = 1, **changes):
    """Random weights large enough that the model has opinions: greedy choices do not hang on rounding."""
    model = tiny_decoder(vocab, **changes).build(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3, generator=generator)
    return model
