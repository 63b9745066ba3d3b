"""The pretrain stage: a decoder or an encoder from scratch on packed token shards."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from headspring.artifacts.errors import UserError
from headspring.artifacts.value import Value
from headspring.data.batch import IGNORE, Batch, SampleSource
from headspring.data.masking import MaskedSamples, Masking
from headspring.data.mixture import Mixture
from headspring.data.packing import PackedTokens
from headspring.data.shards import TokenShards
from headspring.models import Attention, Block, Causal, Decoder, Encoder, Full, RMSNorm, RoPE, SwiGLU, repeat, save_model
from headspring.models.decoder import hidden_size
from headspring.models.feedforward import FeedForward
from headspring.models.mask import Mask
from headspring.models.model import ModelModule
from headspring.tokenization.tokenizer import Tokenizer
from headspring.training import distributed
from headspring.training.balancing import Balancing, balanced
from headspring.training.callbacks import Validation
from headspring.training.config import TrainConfig
from headspring.training.loop import DTYPES, measured_seconds, train, training_flops
from headspring.training.masked import MaskedTokens, masked_validation
from headspring.training.measure import matmul_flops
from headspring.training.objective import NextToken, Objective, held_out_loss

Measure = Callable[[], dict[str, float]]


class Transformer(Value):
    """A uniform stack by its few usual numbers; `decoder(vocab)` and `encoder(vocab)` are the full value trees.

    `hidden` defaults to 8/3 of the width, which gives SwiGLU the parameters of a fourfold MLP; another `feedforward` takes
    the place of SwiGLU ({kind: moe, experts: 8, top: 2, hidden: 192}).
    """

    kind: Literal["transformer"] = "transformer"
    width: int = Field(256, gt=0)
    depth: int = Field(6, gt=0)
    heads: int = Field(4, gt=0)
    kv_heads: int | None = Field(None, gt=0)
    hidden: int | None = Field(None, gt=0)
    feedforward: FeedForward | None = None
    context: int = Field(512, gt=0)
    theta: float = Field(10_000.0, gt=0)
    qk_norm: bool = True
    tied: bool = True

    @model_validator(mode="after")
    def _one_feedforward(self) -> "Transformer":
        if self.hidden is not None and self.feedforward is not None:
            raise ValueError("hidden is the width of the default SwiGLU: give it inside feedforward")
        return self

    def decoder(self, vocab: int) -> Decoder:
        return Decoder(vocab=vocab, width=self.width, layers=self._layers(Causal()), context=self.context, tied=self.tied)

    def encoder(self, vocab: int) -> Encoder:
        """The same stack, seeing both ways."""
        return Encoder(vocab=vocab, width=self.width, layers=self._layers(Full()), context=self.context, tied=self.tied)

    def _layers(self, mask: Mask) -> tuple[Block, ...]:
        qk_norm, position = RMSNorm() if self.qk_norm else None, RoPE(theta=self.theta)
        attention = Attention(heads=self.heads, kv_heads=self.kv_heads, position=position, mask=mask, qk_norm=qk_norm)
        feedforward = self.feedforward or SwiGLU(hidden=self.hidden or hidden_size(self.width))
        return repeat(self.depth, Block(mixer=attention, feedforward=feedforward))


class PretrainConfig(TrainConfig):
    """Model, data mixture and training of the pretrain stage. `sequence_length` defaults to the model's context.

    `objective: masked` trains an encoder to guess the tokens that `masking` hides; `next_token`, a decoder. `balancing` says
    how a mixture of experts is kept busy.
    """

    model: Transformer = Transformer()
    objective: Literal["next_token", "masked"] = "next_token"
    masking: Masking | None = None
    sequence_length: int | None = Field(None, gt=1)
    mixture: Mixture | None = None
    balancing: Balancing | None = None
    packing: Literal["concat", "best_fit"] = "concat"
    validation_samples: int = Field(64, gt=0)

    @model_validator(mode="after")
    def _masking_is_for_encoders(self) -> "PretrainConfig":
        if self.masking is not None and self.objective != "masked":
            raise ValueError("masking belongs to objective: masked; leave it out, or train an encoder")
        return self

    def described(self, vocab: int) -> Decoder | Encoder:
        """The model to train."""
        return self.model.encoder(vocab) if self.objective == "masked" else self.model.decoder(vocab)


def pretrain(
    config: PretrainConfig, tokens_folder: Path, tokenizer_folder: Path, folder: Path, seed: int = 0
) -> dict[str, Any]:
    """Train and write `config.json`, `model.safetensors`, the tokenizer, and `initial/` with the untrained model."""
    folder = Path(folder)
    tokenizer = Tokenizer.load(tokenizer_folder)
    shards = TokenShards(tokens_folder)
    shards.check_tokenizer(tokenizer)
    length = config.sequence_length or config.model.context
    if length > config.model.context:
        raise UserError(f"sequence_length ({length}) is longer than the model's context ({config.model.context})")
    model = config.described(tokenizer.vocab_size).build(seed)
    samples = config.steps * config.batch_size
    packed = PackedTokens(shards, "train", length, config.mixture or Mixture(), seed, config.packing, samples)
    objective: Objective
    data: SampleSource
    if config.objective == "masked":
        objective, data = MaskedTokens(), MaskedSamples(packed, tokenizer, config.masking or Masking(), seed)
        measure = _masked_validation(model, shards, tokenizer, length, config)
    else:
        objective, data, measure = NextToken(), packed, validation(model, shards, length, config)
    if distributed.rank() == 0:
        for target in (folder / "initial",):
            save_model(model, target)
            tokenizer.save(target)
    before = measure()
    objective, balancing = balanced(model, objective, config.balancing)
    callbacks = [*balancing, Validation(measure, config.validate_every)]
    result = train(model, objective, data, config, folder, callbacks, "pretrain")
    after = measure()
    if distributed.rank() == 0:
        save_model(model, folder)
        tokenizer.save(folder)
    return {
        "parameters": model.num_parameters(),
        "active_parameters": model.ledger(length).active_parameters,
        **result.metrics(),
        "validation_before": before,
        "validation_after": after,
        "compute_dtype": config.precision,
        "mixture": packed.tree(),
    }


def _masked_validation(
    model: ModelModule, shards: TokenShards, tokenizer: Tokenizer, length: int, config: PretrainConfig
) -> Measure:
    """The same tokens of the first validation samples are hidden every time, whatever the run's seed."""
    packed = PackedTokens(shards, "validation", length, packing=config.packing)
    data = MaskedSamples(packed, tokenizer, config.masking or Masking(), seed=0)
    rows = min(len(packed), config.validation_samples)
    return masked_validation(model, data, rows, config.batch_size, DTYPES[config.precision], config.document_mask)


def validation(model: ModelModule, shards: TokenShards, length: int, config: PretrainConfig) -> Measure:
    """A function that measures loss (nats a token), perplexity and bits per byte on the first validation samples."""
    data = PackedTokens(shards, "validation", length, packing="best_fit")
    rows = min(len(data), config.validation_samples)
    predicted = shards.num_tokens("validation") - shards.num_documents("validation")  # bos is never a target
    tokens_per_byte = predicted / shards.bytes("validation")

    def measure() -> dict[str, float]:
        loss = held_out_loss(model, data, rows, config.batch_size, DTYPES[config.precision], config.document_mask)
        bits = loss / math.log(2) * tokens_per_byte
        return {"loss": loss, "perplexity": math.exp(min(loss, 80.0)), "bits_per_byte": bits}

    return measure


def plan(config: PretrainConfig, vocab_size: int) -> dict[str, float]:
    """Parameters, tokens, FLOPs and estimated seconds, from a short measurement of one step on this machine."""
    length = config.sequence_length or config.model.context
    model = config.described(vocab_size).build()
    tokens = config.steps * config.batch_size * length
    rows = min(config.batch_size, config.micro_batch_size or config.batch_size, 8)
    ids = torch.randint(0, vocab_size, (rows, length))
    masked = config.objective == "masked"
    share = (config.masking or Masking()).share if masked else 1.0  # of tokens that need a row of logits
    batch = Batch(ids, ids.where(torch.rand(ids.shape) < share, IGNORE))
    seconds = measured_seconds(model, MaskedTokens() if masked else NextToken(), batch, config.precision)
    flops = tokens * training_flops(model, length)
    return {
        "parameters": model.num_parameters(),
        "active_parameters": model.ledger(length).active_parameters,
        "tokens": tokens,
        "flops": flops,
        "seconds": seconds * tokens / ids.numel(),
        "matmul_flops_per_second": matmul_flops(DTYPES[config.precision], "cpu", torch.get_num_threads()),
    }
