"""The pretrain stage: a decoder from scratch on packed token shards."""

import math
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from headspring.artifacts.errors import UserError
from headspring.artifacts.value import Value
from headspring.data.batch import Batch
from headspring.data.mixture import Mixture
from headspring.data.packing import PackedTokens
from headspring.data.shards import TokenShards
from headspring.models import Attention, Block, Decoder, RMSNorm, RoPE, SwiGLU, repeat, save_model
from headspring.models.decoder import DecoderModule, hidden_size
from headspring.tokenization.tokenizer import Tokenizer
from headspring.training import distributed
from headspring.training.callbacks import Validation
from headspring.training.config import TrainConfig
from headspring.training.loop import DTYPES, measured_seconds, train, training_flops
from headspring.training.measure import matmul_flops
from headspring.training.objective import NextToken, held_out_loss


class Transformer(Value):
    """A uniform decoder by its few usual numbers; `decoder(vocab)` is the full value tree.

    `hidden` defaults to 8/3 of the width, which gives SwiGLU the parameters of a fourfold MLP.
    """

    kind: Literal["transformer"] = "transformer"
    width: int = Field(256, gt=0)
    depth: int = Field(6, gt=0)
    heads: int = Field(4, gt=0)
    kv_heads: int | None = Field(None, gt=0)
    hidden: int | None = Field(None, gt=0)
    context: int = Field(512, gt=0)
    theta: float = Field(10_000.0, gt=0)
    qk_norm: bool = True
    tied: bool = True

    def decoder(self, vocab: int) -> Decoder:
        qk_norm = RMSNorm() if self.qk_norm else None
        attention = Attention(heads=self.heads, kv_heads=self.kv_heads, position=RoPE(theta=self.theta), qk_norm=qk_norm)
        feedforward = SwiGLU(hidden=self.hidden or hidden_size(self.width))
        block = Block(mixer=attention, feedforward=feedforward)
        layers = repeat(self.depth, block)
        return Decoder(vocab=vocab, width=self.width, layers=layers, context=self.context, tied=self.tied)


class PretrainConfig(TrainConfig):
    """Model, data mixture and training of the pretrain stage. `sequence_length` defaults to the model's context."""

    model: Transformer = Transformer()
    sequence_length: int | None = Field(None, gt=1)
    mixture: Mixture | None = None
    packing: Literal["concat", "best_fit"] = "concat"
    validation_samples: int = Field(64, gt=0)


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
    model = config.model.decoder(tokenizer.vocab_size).build(seed)
    samples = config.steps * config.batch_size
    data = PackedTokens(shards, "train", length, config.mixture or Mixture(), seed, config.packing, samples)
    measure = validation(model, shards, length, config)
    if distributed.rank() == 0:
        for target in (folder / "initial",):
            save_model(model, target)
            tokenizer.save(target)
    before = measure()
    result = train(model, NextToken(), data, config, folder, [Validation(measure, config.validate_every)], "pretrain")
    after = measure()
    if distributed.rank() == 0:
        save_model(model, folder)
        tokenizer.save(folder)
    return {
        "parameters": model.num_parameters(),
        **result.metrics(),
        "validation_before": before,
        "validation_after": after,
        "compute_dtype": config.precision,
        "mixture": data.tree(),
    }


def validation(model: DecoderModule, shards: TokenShards, length: int, config: PretrainConfig):
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
    model = config.model.decoder(vocab_size).build()
    tokens = config.steps * config.batch_size * length
    rows = min(config.batch_size, config.micro_batch_size or config.batch_size, 8)
    ids = torch.randint(0, vocab_size, (rows, length))
    seconds = measured_seconds(model, NextToken(), Batch(ids, ids), config.precision)
    flops = tokens * training_flops(model, length)
    return {
        "parameters": model.num_parameters(),
        "tokens": tokens,
        "flops": flops,
        "seconds": seconds * tokens / ids.numel(),
        "matmul_flops_per_second": matmul_flops(DTYPES[config.precision], "cpu", torch.get_num_threads()),
    }
