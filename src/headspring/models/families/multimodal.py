"""A decoder with eyes and ears; the matrix tries its text, `tests/models/test_multimodal.py` the rest."""

from headspring.models.attention import Attention
from headspring.models.audio import Sound
from headspring.models.block import Block, repeat
from headspring.models.decoder import Decoder
from headspring.models.families.registry import family
from headspring.models.feedforward import SwiGLU
from headspring.models.mask import Full
from headspring.models.multimodal import Multimodal
from headspring.models.position import NoPE
from headspring.models.vision import Vision


@family("multimodal")
def multimodal() -> Multimodal:
    """Patches and log-mel frames, each through one block, before the house's default decoder."""
    block = Block(mixer=Attention(heads=4, kv_heads=2), feedforward=SwiGLU(hidden=40))
    inside = {
        "width": 20,
        "blocks": (Block(mixer=Attention(heads=2, position=NoPE(), mask=Full()), feedforward=SwiGLU(hidden=28)),),
    }
    image = Vision(placeholder=51, height=6, columns=9, patch=3, **inside)
    sound = Sound(placeholder=52, samples=700, window=100, hop=50, bands=7, frames=4, **inside)
    decoder = Decoder(vocab=53, width=24, layers=repeat(2, block), context=48)
    return Multimodal(decoder=decoder, towers={"image": image, "sound": sound})
