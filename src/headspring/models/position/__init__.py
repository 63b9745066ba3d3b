"""How a model knows the order of its tokens.

| value | what it does | source |
| --- | --- | --- |
| `RoPE` | rotates queries and keys, so that their product depends on the distance | arXiv 2104.09864 |
| `ALiBi` | subtracts slope · distance from the scores | arXiv 2108.12409 |
| `T5Bias`, `SharedBias` | adds a learned number for each bucket of distances to the scores | arXiv 1910.10683 |
| `NoPE` | nothing: order is seen through the causal mask alone | arXiv 2305.19466 |
| `Learned`, `Sinusoidal` | a vector for each place, added to the embedding (`Embed`) | arXiv 1810.04805, 1706.03762 |

The first four are `Position`s, a field of attention; the last two are `AbsolutePosition`s. A rotation is stretched to longer
sequences by a `Scaling`. All six count from the first token of a row or packed document.
"""

from headspring.models.position.absolute import AbsolutePosition, Learned, Sinusoidal
from headspring.models.position.base import NoPE, Position, PositionModule
from headspring.models.position.bias import ALiBi, SharedBias, T5Bias
from headspring.models.position.rotary import RoPE
from headspring.models.position.scaling import DynamicNTK, Linear, Llama3, LongRoPE, Scaling, YaRN

__all__ = [
    "ALiBi",
    "AbsolutePosition",
    "DynamicNTK",
    "Learned",
    "Linear",
    "Llama3",
    "LongRoPE",
    "NoPE",
    "Position",
    "PositionModule",
    "RoPE",
    "Scaling",
    "SharedBias",
    "Sinusoidal",
    "T5Bias",
    "YaRN",
]
