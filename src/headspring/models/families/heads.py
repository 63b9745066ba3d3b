"""A decoder with every head that there is beside its own."""

from headspring.models.attention import Attention
from headspring.models.block import Block, repeat
from headspring.models.decoder import Decoder
from headspring.models.families.registry import family
from headspring.models.feedforward import SwiGLU
from headspring.models.heads import Classifier, Headed, MultiToken, ValueHead


@family("headed")
def headed() -> Headed:
    """Two chained modules of multi-token prediction (DeepSeek-V3), a value for each token, three labels."""
    block = Block(mixer=Attention(heads=4, kv_heads=2), feedforward=SwiGLU(hidden=40))
    body = Decoder(vocab=53, width=24, layers=repeat(2, block), context=48)
    heads = {"ahead": MultiToken(ahead=2, block=block), "value": ValueHead(), "topic": Classifier(labels=("a", "b", "c"))}
    return Headed(body=body, heads=heads)
