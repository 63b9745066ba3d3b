"""Objectives for what is trained beside the next token: tokens further ahead, exits, values and labels.

    Ahead       next token + weight / n · Σ of n tokens further         arXiv 2412.19437, equation 25
    LayerSkip   the next token at every layer, layers left out           arXiv 2404.16710, sections 4.1 and 4.2
    Values      (v − score)² of tokens
    Labels      −log p(label) of texts

All run through `training.loop.train`; the head each one trains is found in the model. The first two are objectives of a
recipe's pretrain stage, and `WithHeads` is what it writes for a model that looks ahead.
"""

import math
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from headspring.artifacts.errors import UserError
from headspring.artifacts.value import Value
from headspring.data.batch import IGNORE
from headspring.data.rows import LabelledBatch, ScoredBatch
from headspring.models.early_exit import stack_of
from headspring.models.heads import ClassifierModule, Headed, MultiToken, MultiTokenModule, ValueHeadModule, find_head
from headspring.models.model import ModelModule
from headspring.models.pooling import pool
from headspring.models.scoring import cross_entropy_sum
from headspring.models.stack import Stack
from headspring.training.architectures import Architecture, Transformer
from headspring.training.objective import NextToken

Loss = tuple[torch.Tensor, dict[str, torch.Tensor]]


# ---- in a recipe


class WithHeads(Architecture):
    """Any decoder (`body`) that also guesses the `ahead` tokens after the next one, each by a block like the body's last.
    `chained` blocks read the tokens in between (arXiv 2412.19437), others the hidden state alone (arXiv 2404.19737)."""

    kind: Literal["headed"] = "headed"
    body: Architecture = Transformer()
    ahead: int = Field(1, gt=0)
    chained: bool = True

    @model_validator(mode="before")
    @classmethod
    def _is_as_long_as_its_body(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        body = Architecture.choose(value.get("body", {}))
        if value.get("context", body.context) != body.context:
            raise ValueError(f"context ({value['context']}) is that of body ({body.context}); leave it out")
        return {**value, "context": body.context, "body": body}

    def decoder(self, vocab: int) -> Headed:
        body = self.body.decoder(vocab)
        if not isinstance(body, Stack):
            raise UserError(
                f"a model of kind {self.body.kind!r} takes no heads; the body of kind headed is a decoder of blocks"
            )
        head = MultiToken(ahead=self.ahead, chained=self.chained, block=body.layers[-1])
        return Headed(vocab=body.vocab, width=body.width, context=body.context, body=body, heads={"ahead": head})


class LookingAhead(Value):
    """What objective: multi_token trains beside the next token: `weight` times the mean loss of the tokens after it."""

    weight: float = Field(0.3, gt=0)


class LeavingEarly(Value):
    """How objective: layer_skip trains every layer to be the last; see `LayerSkip`."""

    dropout: float = Field(0.1, ge=0, lt=1)
    exit_scale: float = Field(0.2, ge=0)


# ---- objectives


class Ahead(NextToken):
    """The next token and, with `weight`, the mean loss of those that the model's `MultiToken` looks ahead to. A target of
    another document than the token's own carries no loss."""

    def __init__(self, weight: float = 0.3):
        self.weight = weight

    def loss(self, model: ModelModule, batch: Any) -> Loss:
        head, body = find_head(model, MultiTokenModule), stack_of(model)
        hidden = model(batch.inputs, segments=batch.segments)
        next_token = cross_entropy_sum(model, hidden, batch.targets)
        metrics, further = {"cross_entropy": next_token}, hidden.new_zeros((), dtype=torch.float32)
        for number, ahead in enumerate(head.foresee(body, hidden, batch.inputs, batch.segments), 1):
            targets = targets_ahead(batch.targets, batch.segments, number)
            metrics[f"cross_entropy_{number}_further"] = cross_entropy_sum(model, ahead, targets)
            further = further + metrics[f"cross_entropy_{number}_further"]
        return next_token + self.weight / head.value.ahead * further, {name: loss.detach() for name, loss in metrics.items()}


def targets_ahead(targets: torch.Tensor, segments: torch.Tensor | None, number: int) -> torch.Tensor:
    """(B, T − number): the targets so many places further, IGNORE where they are of another document."""
    later = targets[:, number:]
    if segments is None:
        return later
    return torch.where(segments[:, number:] == segments[:, :-number], later, IGNORE)


class LayerSkip(NextToken):
    """Cross-entropy at every layer through the model's own norm and head, layers weighing more the later they stand, and
    layers left out by chance, more of them the later they stand.

    A row leaves layer l of L out with probability `dropout` · (2^(l / (L − 1)) − 1). `exit_scale` is how much the layers
    before the last weigh. The chance is a function of the row's tokens and the layer: neither resuming nor micro-batches
    change it, and a row that comes again is cut in the same way again.
    """

    def __init__(self, dropout: float = 0.1, exit_scale: float = 0.2):
        if not 0 <= dropout < 1:
            raise UserError(f"dropout is a probability below 1, not {dropout}")
        self.dropout, self.exit_scale = dropout, exit_scale

    def loss(self, model: ModelModule, batch: Any) -> Loss:
        stack = stack_of(model)
        layers = len(stack.layers)
        if layers < 2:
            raise UserError("a model of one layer has no earlier one to leave after")
        exits = [f"layers.{index}.residual.post" for index in range(layers - 1)]
        with (
            model.sites.edit(self._left_out(batch.inputs, layers) if model.training else {}),
            model.sites.capture(exits) as seen,
        ):
            hidden = model(batch.inputs, segments=batch.segments)
        final = cross_entropy_sum(model, hidden, batch.targets)
        weights = exit_weights(layers, self.exit_scale)
        total = weights[-1] * final
        for weight, name in zip(weights[:-1], exits):
            early = seen[name] if stack.norm is None else stack.norm(seen[name])
            total = total + weight * cross_entropy_sum(model, early, batch.targets)
        return total, {"cross_entropy": final.detach()}

    def _left_out(self, tokens: torch.Tensor, layers: int) -> dict[str, Any]:
        """Edits after which some rows leave each layer as they came."""
        edits: dict[str, Any] = {}
        for index in range(layers):
            out = chance(tokens, index) < self.dropout * (2 ** (index / (layers - 1)) - 1)
            before: list[torch.Tensor] = []

            def enter(x: torch.Tensor, before: list[torch.Tensor] = before) -> torch.Tensor:
                before[:] = [x]
                return x

            def leave(x: torch.Tensor, before: list[torch.Tensor] = before, out: torch.Tensor = out) -> torch.Tensor:
                return torch.where(out[:, None, None], before[0], x)

            edits |= {f"layers.{index}.residual.pre": enter, f"layers.{index}.residual.post": leave}
        return edits


def exit_weights(layers: int, scale: float) -> list[float]:
    """The share of each layer's loss, summing to 1 (arXiv 2404.16710, equations 4 and 5)."""
    raw = [scale * layer * (layer + 1) / 2 for layer in range(layers - 1)]
    raw.append(layers - 1 + scale * (layers - 2) * (layers - 1) / 2)
    return [weight / math.fsum(raw) for weight in raw]


def chance(tokens: torch.Tensor, salt: int) -> torch.Tensor:
    """(B,) float32 in [0, 1): a hash of each row of (B, T) int64 and `salt`."""
    places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    of_rows = (_scrambled(tokens + 1) * (2 * places + 1)).sum(1)
    mixed = _scrambled(of_rows + _scrambled(torch.full_like(of_rows, salt + 1)))
    return (mixed & 0xFFFFFF).float() / 0x1000000


def _scrambled(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64 (Steele et al. 2014), in wrapping int64."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


class Values:
    """Squared error of the `ValueHead` over the tokens that have a score. With `frozen` the body is read and not trained."""

    def __init__(self, frozen: bool = False):
        self.frozen = frozen

    def count(self, batch: ScoredBatch) -> int:
        return int((~batch.scores.isnan()).sum())

    def loss(self, model: ModelModule, batch: ScoredBatch) -> Loss:
        hidden = model(batch.inputs, padding=batch.padding)
        values = find_head(model, ValueHeadModule)(hidden.detach() if self.frozen else hidden)
        scored = ~batch.scores.isnan()
        return (values[scored] - batch.scores[scored]).square().sum(), {}


class Labels:
    """Cross-entropy of the `Classifier`'s labels, nats a text; `right` is the share of texts it gets right."""

    def __init__(self, name: str | None = None, frozen: bool = False):
        self.name, self.frozen = name, frozen

    def count(self, batch: LabelledBatch) -> int:
        return len(batch.labels)

    def loss(self, model: ModelModule, batch: LabelledBatch) -> Loss:
        head = find_head(model, ClassifierModule, self.name)
        hidden = model(batch.inputs, padding=batch.padding)
        pooled = pool(stack_of(model), hidden.detach() if self.frozen else hidden, batch.padding, head.value.pooling)
        with torch.no_grad():
            right = (head(pooled).argmax(-1) == batch.labels).sum().float()
        return cross_entropy_sum(head, pooled, batch.labels), {"right": right}
