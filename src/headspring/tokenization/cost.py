"""What a tokenizer costs the model that uses it, before that model exists.

The text is fixed, the tokenizer is not: so every price is per 1,000 characters of text. A larger vocabulary buys
shorter sequences (attention, key–value cache, context in characters) with embedding parameters.
"""

from dataclasses import dataclass

CHARACTERS = 1000


@dataclass(frozen=True)
class ModelShape:
    """The sizes that the prices depend on. `bytes`: of one stored key or value (2 for bf16)."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    bytes: int = 2
    tied: bool = True  # input and output embedding are one matrix
    context: int | None = None  # tokens

    @property
    def kv_bytes_per_token(self) -> int:
        """2 · layers · key–value heads · head dimension · bytes."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.bytes


@dataclass(frozen=True)
class Cost:
    """Prices of one tokenizer and one model shape on one corpus."""

    embedding_parameters: int
    tokens: float  # per 1,000 characters
    attention_flops: float  # to read 1,000 characters from nothing: scores and weighted sums, causal, no projections
    kv_cache_bytes: float  # per 1,000 characters
    context_characters: float | None  # how much text the context holds


def cost(vocab_size: int, characters: int, tokens: int, shape: ModelShape) -> Cost:
    """`characters` of a corpus became `tokens`. n tokens attend to 1 … n keys: 4·L·h·d · n(n + 1)/2 FLOPs."""
    n = CHARACTERS * tokens / characters if characters else float("nan")
    return Cost(
        embedding_parameters=vocab_size * shape.width * (1 if shape.tied else 2),
        tokens=n,
        attention_flops=4 * shape.layers * shape.heads * shape.head_dim * n * (n + 1) / 2,
        kv_cache_bytes=n * shape.kv_bytes_per_token,
        context_characters=None if shape.context is None else shape.context * CHARACTERS / n,
    )
