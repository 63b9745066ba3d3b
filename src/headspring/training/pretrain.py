"""The pretrain stage: a model of any family from scratch on packed token shards."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from headspring.artifacts.errors import UserError
from headspring.data.batch import IGNORE, Batch, SampleSource
from headspring.data.masking import MaskedSamples, Masking
from headspring.data.mixture import Mixture
from headspring.data.packing import PackedTokens
from headspring.data.shards import TokenShards
from headspring.data.spans import CorruptedSpans, SpanCorruption
from headspring.models import save_model
from headspring.models.drawing import draw
from headspring.models.heads import Headed
from headspring.models.model import Model, ModelModule
from headspring.models.ngram import NGram, NGramModule
from headspring.models.stack import Stack
from headspring.tokenization.tokenizer import Tokenizer
from headspring.training import counting, distributed
from headspring.training.architectures import Architecture, Counting, Transformer
from headspring.training.balancing import Balancing, balanced
from headspring.training.callbacks import Validation
from headspring.training.config import TrainConfig
from headspring.training.heads import Ahead, LayerSkip, LeavingEarly, LookingAhead
from headspring.training.loop import DTYPES, measured_seconds, train, training_flops
from headspring.training.masked import MaskedTokens, masked_validation
from headspring.training.measure import matmul_flops
from headspring.training.objective import NextToken, Objective, held_out_loss
from headspring.training.span_corruption import begins_answers, span_validation

Measure = Callable[[], dict[str, float]]
ANY_VOCAB = 1024  # that of a model which is only looked at
DETAILS = (  # key → the objective it belongs to, and what that trains
    ("masking", "masked", "an encoder"),
    ("spans", "spans", "an encoder–decoder"),
    ("multi_token", "multi_token", "a model of kind headed"),
    ("layer_skip", "layer_skip", "a decoder"),
)


class PretrainConfig(TrainConfig):
    """Model, data mixture and training of the pretrain stage. `sequence_length` defaults to the model's context.

    `objective: masked` trains an encoder to guess the tokens that `masking` hides; `next_token`, a decoder; `spans`, an
    encoder–decoder to write what `spans` takes out; `multi_token`, a decoder with a head that looks further ahead;
    `layer_skip`, a decoder that can be left after any layer. `balancing` says how a mixture of experts is kept busy.
    """

    model: Architecture = Transformer()
    objective: Literal["next_token", "masked", "spans", "multi_token", "layer_skip"] = "next_token"
    masking: Masking | None = None
    spans: SpanCorruption | None = None
    multi_token: LookingAhead | None = None
    layer_skip: LeavingEarly | None = None
    sequence_length: int | None = Field(None, gt=1)
    mixture: Mixture | None = None
    balancing: Balancing | None = None
    packing: Literal["concat", "best_fit"] = "concat"
    validation_samples: int = Field(64, gt=0)

    @model_validator(mode="after")
    def _details_are_of_the_objective(self) -> "PretrainConfig":
        for name, objective, of in DETAILS:
            if getattr(self, name) is not None and self.objective != objective:
                raise ValueError(f"{name} belongs to objective: {objective}; leave it out, or train {of}")
        if self.objective == "spans" and self.packing != "concat":
            raise ValueError("objective: spans needs packing: concat, as pads are no text to take out")
        return self

    @model_validator(mode="after")
    def _counting_uses_it(self) -> "PretrainConfig":
        """What is counted has no optimizer: a key that only training would read is refused, not ignored."""
        unread = sorted(self.model_fields_set - counting.READS)
        if isinstance(self.model, Counting) and unread:
            raise ValueError(f"{unread[0]} says how to train, and a model of kind 'ngram' is counted: leave it out")
        return self

    @model_validator(mode="after")
    def _model_can_be_built(self) -> "PretrainConfig":
        """Sizes that do not fit together are found before a stage runs; tensors without memory cost next to nothing."""
        with torch.device("meta"):
            self.described(ANY_VOCAB).module()
        return self

    def described(self, vocab: int) -> Model:
        """The model to train. Raises `UserError` where its family cannot have this objective."""
        if self.objective == "spans":
            return self.model.encoder_decoder(vocab, start=0)
        if self.objective == "masked":
            return self.model.encoder(vocab)
        model = self.model.decoder(vocab)
        if isinstance(model, Headed) != (self.objective == "multi_token"):
            raise UserError("a model of kind 'headed' and objective: multi_token belong together: only it trains the head")
        if self.objective == "layer_skip" and (not isinstance(model, Stack) or len(model.layers) < 2):
            raise UserError("objective: layer_skip trains a decoder of two layers at least to be left after each")
        return model

    def minimised(self) -> Objective:
        """What the loop minimises, but for the balance of experts."""
        if self.objective == "multi_token":
            return Ahead((self.multi_token or LookingAhead()).weight)
        if self.objective == "layer_skip":
            how = self.layer_skip or LeavingEarly()
            return LayerSkip(how.dropout, how.exit_scale)
        return MaskedTokens() if self.objective == "masked" else NextToken()


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
    model = _begun(config.described(tokenizer.vocab_size), tokenizer).build(seed)
    samples = config.steps * config.batch_size
    packed = PackedTokens(shards, "train", length, config.mixture or Mixture(), seed, config.packing, samples)
    data: SampleSource
    if config.objective == "masked":
        data = MaskedSamples(packed, tokenizer, config.masking or Masking(), seed)
        measure = _masked_validation(model, shards, tokenizer, length, config)
    elif config.objective == "spans":
        data = CorruptedSpans(packed, tokenizer, config.spans or SpanCorruption(), seed)
        measure = _span_validation(model, shards, tokenizer, length, config)
    else:
        data, measure = packed, validation(model, shards, length, config)
    if distributed.rank() == 0:
        _save(model, tokenizer, folder / "initial")
    before = measure()
    objective, balancing = balanced(model, config.minimised(), config.balancing)
    if isinstance(model, NGramModule):
        trained = counting.count(model, packed)
    else:
        callbacks = [*balancing, Validation(measure, config.validate_every)]
        trained = train(model, objective, data, config, folder, callbacks, "pretrain").metrics()
    after = measure()
    if distributed.rank() == 0:
        _save(model, tokenizer, folder)
    return {
        "parameters": model.num_parameters(),
        "active_parameters": model.ledger(length).active_parameters,
        **trained,
        "validation_before": before,
        "validation_after": after,
        "compute_dtype": "fp32" if model.config.counted else config.precision,
        "mixture": packed.tree(),
    }


def _begun(model: Model, tokenizer: Tokenizer) -> Model:
    """What is counted knows the token that begins documents, and what writes, the one that begins answers. Raises `UserError`
    where the tokenizer has none."""
    if isinstance(model, NGram):
        return counting.begun(model, tokenizer.bos_id)
    return begins_answers(model, tokenizer.bos_id or 0)


def _save(model: ModelModule, tokenizer: Tokenizer, folder: Path) -> None:
    save_model(model, folder)
    tokenizer.save(folder)


def _masked_validation(
    model: ModelModule, shards: TokenShards, tokenizer: Tokenizer, length: int, config: PretrainConfig
) -> Measure:
    """The same tokens of the first validation samples are hidden every time, whatever the run's seed."""
    packed = PackedTokens(shards, "validation", length, packing=config.packing)
    data = MaskedSamples(packed, tokenizer, config.masking or Masking(), seed=0)
    rows = min(len(packed), config.validation_samples)
    return masked_validation(model, data, rows, config.batch_size, DTYPES[config.precision], config.document_mask)


def _span_validation(
    model: ModelModule, shards: TokenShards, tokenizer: Tokenizer, length: int, config: PretrainConfig
) -> Measure:
    """The same spans of the first validation samples are taken out every time, whatever the run's seed."""
    packed = PackedTokens(shards, "validation", length)
    data = CorruptedSpans(packed, tokenizer, config.spans or SpanCorruption(), seed=0)
    rows = min(len(packed), config.validation_samples)
    return span_validation(model, data, rows, config.batch_size, DTYPES[config.precision])


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


def sizes(config: PretrainConfig, vocab_size: int) -> dict[str, float] | None:
    """What the memory of training depends on, under the names of `line.registry.Sizes`; None for what is counted."""
    described = config.described(vocab_size)
    if described.counted:
        return None
    with torch.device("meta"):
        model = described.module()
    ledger = model.ledger(config.sequence_length or config.model.context)
    layers = [part for part in ledger.children if part.name.startswith("layers.")]
    kept = sum(layer.activation_bytes for layer in layers)
    again = max((layer.activation_bytes for layer in layers), default=0.0)  # one layer at a time
    inputs = 2.0 * described.width * len(layers)
    rules = model.rules_by_name
    return {
        "parameters": model.num_parameters(),
        "matrices": sum(p.numel() for name, p in model.named_parameters() if rules[name].group == "matrix"),
        "vocab": described.vocab,
        "activations": ledger.activation_bytes,
        "checkpointed": ledger.activation_bytes - kept + again + inputs,
        "context": config.model.context,
    }


def drawing(config: PretrainConfig, vocab_size: int) -> str:
    """The model with shapes, parameters and FLOPs a token for each part, at the length it is trained on."""
    with torch.device("meta"):
        model = config.described(vocab_size).module()
    return draw(model.ledger(config.sequence_length or config.model.context))


def plan(config: PretrainConfig, vocab_size: int) -> dict[str, float]:
    """Parameters, tokens, FLOPs and estimated seconds, from a short measurement of one step on this machine."""
    length = config.sequence_length or config.model.context
    model = config.described(vocab_size).build()
    tokens = config.steps * config.batch_size * length
    counted = model.config.counted
    return {
        "parameters": model.num_parameters(),
        "active_parameters": model.ledger(length).active_parameters,
        "tokens": tokens,
        "flops": 0.0 if counted else tokens * training_flops(model, length),
        "seconds": tokens * (counting.SECONDS_PER_TOKEN if counted else _seconds_per_token(config, model, length)),
        "matmul_flops_per_second": matmul_flops(DTYPES[config.precision], "cpu", torch.get_num_threads()),
    }


def _seconds_per_token(config: PretrainConfig, model: ModelModule, length: int) -> float:
    """Of a forward and backward pass on random tokens."""
    rows = min(config.batch_size, config.micro_batch_size or config.batch_size, 8)
    ids = torch.randint(0, model.config.vocab, (rows, length))
    share = (config.masking or Masking()).share if config.objective == "masked" else 1.0  # of tokens that need logits
    batch = Batch(ids, ids.where(torch.rand(ids.shape) < share, IGNORE))
    if config.objective == "spans":
        taken, spans = (config.spans or SpanCorruption()).counts(length)
        answer = ids[:, : taken + spans + 1]
        batch = Batch(answer, answer, source=ids[:, : length - taken + spans])
    return measured_seconds(model, config.minimised(), batch, config.precision) / ids.numel()
