"""What attention over one's own tokens and attention over a memory have in common: heads, made by four matrices."""

from pydantic import Field, model_validator

from headspring.models.mixer import Mixer, MixerModule
from headspring.models.norm import Norm, NormModule, RMSNorm
from headspring.models.part import Linear


class Projected(Mixer):
    """`heads` query heads share `kv_heads` keys and values (default: as many). `head_dim` defaults to width / heads.

    `qk_norm` normalises each head's query and key. `bias` puts biases on q, k and v, `out_bias` on the output. `scale`
    multiplies the scores (default 1 / sqrt(head_dim)).
    """

    heads: int = Field(4, gt=0)
    kv_heads: int | None = Field(None, gt=0)
    head_dim: int | None = Field(None, gt=0)
    qk_norm: Norm | None = RMSNorm()
    bias: bool = False
    out_bias: bool = False
    scale: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _heads_divide(self) -> "Projected":
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        return self


class ProjectedModule(MixerModule):
    """The matrices q, k, v and out, and the norms of queries and keys."""

    site_names = ("q", "k", "v", "pattern", "heads", "out")
    plain_sites = ("pattern",)

    def __init__(self, value: Projected, width: int):
        super().__init__()
        if value.head_dim is None and width % value.heads:
            raise ValueError(f"width ({width}) must be a multiple of heads ({value.heads}), or head_dim be given")
        self.heads, self.kv_heads = value.heads, value.kv_heads or value.heads
        self.channels = value.head_dim or width // value.heads
        self.q = Linear(width, self.heads * self.channels, bias=value.bias)
        self.k = Linear(width, self.kv_heads * self.channels, bias=value.bias)
        self.v = Linear(width, self.kv_heads * self.channels, bias=value.bias)
        self.out = Linear(self.heads * self.channels, width, bias=value.out_bias, std=0.0)
        self.q_norm: NormModule | None = value.qk_norm.build(self.channels) if value.qk_norm else None
        self.k_norm: NormModule | None = value.qk_norm.build(self.channels) if value.qk_norm else None
