"""Supervised fine-tuning: the same next-token objective and loop as pretraining, on conversations.

What makes it SFT is the data (`data.conversations`): only what an assistant says, and the token that ends its turn, is
a target, and every packed conversation sees itself alone. The loss is averaged over the trained tokens of a whole step,
so that neither accumulation nor packing changes what is optimised.

A model that sees nothing but conversations forgets plain text. So some rows are text of the training split again, as in
pretraining (rehearsal; the pretraining term of InstructGPT, arXiv 2203.02155, equation 2). Their share is counted in
trained tokens, for that is what the loss averages over: a row of text trains all of its tokens, a row of conversations
perhaps a tenth, so that a few rows of text are already half of the loss.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from headspring.artifacts import UserError
from headspring.data.batch import IGNORE, SampleSource
from headspring.data.blend import Blend
from headspring.data.conversations import PackedConversations
from headspring.data.packing import PackedTokens
from headspring.data.shards import TokenShards
from headspring.data.task_files import write_tasks
from headspring.data.tasks import TaskConfig, counts
from headspring.models import load_model, save_model
from headspring.posttraining.held_out import split_tasks
from headspring.tokenization.tokenizer import Tokenizer
from headspring.training import distributed
from headspring.training.callbacks import Validation
from headspring.training.config import TrainConfig
from headspring.training.loop import DTYPES, train
from headspring.training.objective import NextToken, held_out_loss
from headspring.training.optimizers import AdamW, OptimizerConfig


class SFTConfig(TrainConfig):
    """Tasks and training of the sft stage. Say how long by `steps` or by `epochs` of the conversations, not both.

    `pretraining_share` of the trained tokens are text of the training split, the rest is what assistants say.
    `sequence_length` defaults to the model's context; `validation_per_kind` held-out tasks a kind are measured."""

    tasks: TaskConfig = TaskConfig()
    epochs: int | None = Field(None, gt=0)
    pretraining_share: float = Field(0.5, ge=0, lt=1)
    sequence_length: int | None = Field(None, gt=1)
    validation_per_kind: int = Field(30, gt=0)
    batch_size: int = Field(16, gt=0)
    optimizer: OptimizerConfig = AdamW(learning_rate=1e-3, weight_decay=0.0)
    document_mask: bool = True

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> "SFTConfig":
        if self.epochs is not None and "steps" in self.model_fields_set:
            raise ValueError("steps and epochs both say how long to train; give one of them")
        return self


def sft(
    config: SFTConfig, model_folder: Path, data_folder: Path, tokens_folder: Path, folder: Path, seed: int = 0
) -> dict[str, Any]:
    """Fine-tune the model of `model_folder` on tasks from the training documents of `data_folder`, and on the text of
    `tokens_folder`.

    Writes `config.json`, `model.safetensors`, the tokenizer, `tasks.jsonl`, `logs/` and `checkpoints/` into `folder`.
    Returns the metrics, with the loss on held-out validation conversations before and after (nats a trained token)."""
    folder = Path(folder)
    model, tokenizer = load_model(model_folder), Tokenizer.load(model_folder)
    length = row_length(config.sequence_length, model)
    tasks, held_out_tasks = split_tasks(config.tasks, data_folder, seed, config.validation_per_kind)
    conversations = PackedConversations(tasks, tokenizer, length, seed)
    shards = TokenShards(tokens_folder)
    shards.check_tokenizer(tokenizer)
    share = text_rows(config.pretraining_share, conversations, shards)
    if config.epochs is not None:
        steps = math.ceil(config.epochs * conversations.rows / ((1 - share) * config.batch_size))
        config = config.model_copy(update={"steps": steps})
    data = blend(conversations, shards, share, seed, config.steps * config.batch_size)
    held_out = PackedConversations(held_out_tasks, tokenizer, length, 0)
    measure = validation(model, held_out, config)
    before = measure()
    result = train(model, NextToken(), data, config, folder, [Validation(measure, config.validate_every)], "sft")
    after = measure()
    if distributed.rank() == 0:
        save_model(model, folder)
        tokenizer.save(folder)
        write_tasks(tasks, folder)
    seen = blend(conversations, shards, share, seed, result.steps * config.batch_size)  # minutes may have cut the run
    return {
        "parameters": model.num_parameters(),
        **result.metrics(),
        "validation_before": before,
        "validation_after": after,
        "tasks": counts(tasks),
        "validation_tasks": counts(held_out_tasks),
        "conversations": len(conversations.conversations),
        "dropped": conversations.dropped,
        "rows": conversations.rows,
        "epochs": seen.counts["conversations"] / conversations.rows,
        "trained_tokens": trained_tokens(seen),
        "compute_dtype": config.precision,
    }


def text_rows(share: float, conversations: PackedConversations, shards: TokenShards) -> float:
    """The share of rows that must be text for `share` of the trained tokens to be."""
    if share == 0:
        return 0.0
    spoken = sum(item.trained_tokens for item in conversations.conversations) / conversations.rows  # tokens a row
    text = packed_text(shards, conversations.sequence_length)
    written = sum(layout.ledger()["trained"] for layout in text.layouts.values()) / len(text)
    return share * spoken / (share * spoken + (1 - share) * written)


def packed_text(shards: TokenShards, length: int, seed: int = 0, num_samples: int | None = None) -> PackedTokens:
    """The training text in rows of whole documents, as far as they fit."""
    return PackedTokens(shards, "train", length, seed=seed, packing="best_fit", num_samples=num_samples)


def blend(conversations: PackedConversations, shards: TokenShards, share: float, seed: int, num_samples: int) -> Blend:
    """The stage's stream of `num_samples` rows: conversations, and `share` of the rows text."""
    streams: dict[str, SampleSource] = {"conversations": conversations.first(num_samples)}
    if share:
        streams["text"] = packed_text(shards, conversations.sequence_length, seed, num_samples)
    weights = {"conversations": 1 - share, "text": share}
    return Blend(streams, {name: weights[name] for name in streams}, num_samples)


def trained_tokens(data: Blend) -> dict[str, int]:
    """How many targets of each stream the samples of `data` hold."""

    def count(stream: SampleSource, samples: int) -> int:
        return sum(int((stream.sample(k).targets != IGNORE).sum()) for k in range(samples))

    return {name: count(stream, data.counts[name]) for name, stream in data.streams.items()}


def row_length(wanted: int | None, model: Any) -> int:
    """The row length: as wanted, or the model's context. Raises `UserError` where the model cannot take it."""
    context = model.config.context
    if wanted is not None and wanted > context:
        raise UserError(f"sequence_length ({wanted}) is longer than the model's context ({context})")
    return wanted or context


def validation(model: Any, data: PackedConversations, config: TrainConfig) -> Callable[[], dict[str, float]]:
    """A function that measures loss (nats a trained token) and perplexity over one epoch of `data`."""

    def measure() -> dict[str, float]:
        loss = held_out_loss(model, data, len(data), config.batch_size, DTYPES[config.precision], config.document_mask)
        return {"loss": loss, "perplexity": math.exp(min(loss, 80.0))}

    return measure
