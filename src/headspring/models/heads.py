"""Heads beside the one for the next token: tokens further ahead, a value for each token, a label for a text.

    Headed(body=Decoder(…), heads={"ahead": MultiToken(ahead=2, block=…), "value": ValueHead()})

    hidden (B, T, D) ─┬─ the body's own head        → logits of the next token, untouched
                      ├─ MultiToken                 → logits of the tokens after it, by the same matrix
                      ├─ ValueHead                  → (B, T), what is expected from here on
                      └─ Classifier                 → (B, labels), of the pooled text

A head reads the hidden states that the model returns, so that the main path has no branch in it. A value or a class needs
no more than a row of weights for each number. Tokens further ahead need a block each: *chained* ones (DeepSeek-V3, arXiv
2412.19437, section 2.2) read the true tokens in between, h′ₖ = block(W [norm(h′ₖ₋₁) ; norm(emb(t₊ₖ))]), and keep the causal
chain whole; *parallel* ones (arXiv 2404.19737) read the hidden state alone, and can be asked all at once.

What it gives up: the blocks of `MultiToken` keep no state. `draft` reads the whole prefix again through them, which is one
block against the many of the model.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field, field_validator, model_validator
from torch import nn

from headspring.artifacts.errors import UserError
from headspring.artifacts.value import Variant
from headspring.models.around import Around, AroundModule, with_sizes_of
from headspring.models.block import Block, BlockModule
from headspring.models.context import Context
from headspring.models.embedding import Table
from headspring.models.model import Model, ModelModule
from headspring.models.norm import Norm, RMSNorm
from headspring.models.part import Cost, Linear, PartModule
from headspring.models.pooling import Pooling, pool
from headspring.models.stack import Stack, StackModule
from headspring.models.state import State


class ExtraHead(Variant):
    """The value of a head beside the model's own. `check(body)` raises `ValueError` for a model it is not for."""

    def check(self, body: Model) -> None:
        """Any model will do, unless a head says otherwise."""

    def build(self, width: int) -> "ExtraHeadModule":
        raise NotImplementedError


class ExtraHeadModule(PartModule):
    """Its cost is per token."""

    def cost(self, name: str, context_length: int) -> Cost:
        raise NotImplementedError


H = TypeVar("H", bound=ExtraHeadModule)


# ---- one number a token, one label a text


class ValueHead(ExtraHead):
    """v = w · h + b for each token: the return that is expected from there on (PPO's critic), or the score of a prefix."""

    kind: Literal["value"] = "value"

    def build(self, width: int) -> "ValueHeadModule":
        return ValueHeadModule(width)


class ValueHeadModule(ExtraHeadModule):
    """hidden (B, T, D) → (B, T) float32. It starts at 0 for every token."""

    def __init__(self, width: int):
        super().__init__()
        self.row = Table(1, width, "head", std=0.0, bias=True)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden.float(), self.row.weight, self.row.bias).squeeze(-1)

    def cost(self, name: str, context_length: int) -> Cost:
        width = self.row.weight.shape[1]
        return Cost(name, width + 1, 2.0 * width, 4.0 * width, 0.0, f"{width} → 1")


class Classifier(ExtraHead):
    """Which of `labels` a text has, from its hidden states pooled (a causal model's last token is the only one that has seen
    all of it; an encoder's mean is the better choice)."""

    kind: Literal["classifier"] = "classifier"
    labels: tuple[str, ...] = Field(min_length=2)
    pooling: Pooling = Pooling(mode="last", normalize=False)

    @field_validator("labels")
    @classmethod
    def _each_once(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(labels)) < len(labels):
            raise ValueError(f"labels must differ: {', '.join(labels)}")
        return labels

    def check(self, body: Model) -> None:
        if body.causal and self.pooling.mode == "first":
            raise ValueError("the first token of a causal model has seen nothing of the text; pool by 'last' or 'mean'")

    def build(self, width: int) -> "ClassifierModule":
        return ClassifierModule(self, width)


class ClassifierModule(ExtraHeadModule):
    """Pooled texts (B, D) → logits (B, labels) float32. It is a head for `models.scoring`, over labels instead of tokens."""

    softcap = None

    def __init__(self, value: Classifier, width: int):
        super().__init__()
        self.value = value
        self.rows = Table(len(value.labels), width, "head", bias=True)

    @property
    def output_weight(self) -> torch.Tensor:
        return self.rows.weight

    @property
    def output_bias(self) -> torch.Tensor | None:
        return self.rows.bias

    def head_input(self, pooled: torch.Tensor) -> torch.Tensor:
        return pooled

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(pooled.float(), self.rows.weight, self.rows.bias)

    def cost(self, name: str, context_length: int) -> Cost:
        """Of its work nothing: it runs once a text, and not once a token."""
        labels, width = self.rows.weight.shape
        return Cost(name, labels * width + labels, shape=f"{width} → {labels}")


# ---- tokens further ahead


class MultiToken(ExtraHead):
    """The `ahead` tokens after the next one, each by a `block` of its own and the model's own head. `norm` stands before what
    is read and before the head."""

    kind: Literal["multi_token"] = "multi_token"
    ahead: int = Field(1, gt=0)
    block: Block
    chained: bool = True
    norm: Norm = RMSNorm()

    @model_validator(mode="after")
    def _stands_alone(self) -> "MultiToken":
        if self.block.cross is not None:
            raise ValueError("the block of a multi_token head reads no encoder: leave cross out")
        return self

    def check(self, body: Model) -> None:
        if not isinstance(body, Stack) or not body.causal:
            raise ValueError(f"a multi_token head is for decoders; this body is of kind {body.kind!r}")
        if not getattr(self.block.mixer.f, "causal", True):
            raise ValueError("the block of a multi_token head must be causal: the tokens it is to guess come later")

    def build(self, width: int) -> "MultiTokenModule":
        return MultiTokenModule(self, width)


class StepAhead(PartModule):
    """One step further: x (B, T, D), and the embeddings (B, T, D) of the tokens in between → (B, T, D)."""

    def __init__(self, value: MultiToken, width: int):
        super().__init__()
        self.block = BlockModule(value.block, width)
        self.out = value.norm.build(width)
        self.merge = Linear(2 * width, width) if value.chained else None
        self.of_hidden = value.norm.build(width) if value.chained else None
        self.of_token = value.norm.build(width) if value.chained else None

    def forward(self, x: torch.Tensor, embedded: torch.Tensor, context: Context) -> torch.Tensor:
        if self.merge is not None and self.of_hidden is not None and self.of_token is not None:
            x = self.merge(torch.cat([self.of_hidden(x), self.of_token(embedded)], dim=-1))
        self.block.prepare(context)
        return self.block(x, context)

    def cost(self, name: str, context_length: int) -> Cost:
        parts = [self.block.cost("block", context_length), self.out.cost("out")]
        if self.merge is not None and self.of_hidden is not None and self.of_token is not None:
            parts += [self.merge.cost("merge"), self.of_hidden.cost("of_hidden"), self.of_token.cost("of_token")]
        return Cost.sum(name, tuple(parts))


class MultiTokenModule(ExtraHeadModule):
    """`foresee` for training, `draft` for guessing ahead of the model. Its products with the vocabulary use the body's matrix;
    the model that has both counts them."""

    def __init__(self, value: MultiToken, width: int):
        super().__init__()
        self.value = value
        self.steps = nn.ModuleList(StepAhead(value, width) for _ in range(value.ahead))

    def _step(
        self,
        number: int,
        body: StackModule,
        x: torch.Tensor,
        tokens: torch.Tensor,
        segments: torch.Tensor | None,
        padding: torch.Tensor | None,
    ) -> torch.Tensor:
        """Step `number` (from 1) of x (B, n, D), given the `tokens` (B, n) that stand so many places further."""
        context = Context.of(x.shape[1], 0, segments, padding, x.device)
        return self.steps[number - 1](x, body.embed(tokens, x.dtype, context.positions), context)

    def foresee(
        self,
        body: StackModule,
        hidden: torch.Tensor,
        tokens: torch.Tensor,
        segments: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
    ) -> Iterator[torch.Tensor]:
        """For k = 1 … `ahead`, what `body.logits` makes logits of: (B, T − k, D), of which row i says token i + k + 1.

        `hidden` (B, T, D) are the body's states of `tokens` (B, T)."""
        time, x = tokens.shape[1], hidden
        if time <= self.value.ahead:
            raise ValueError(f"{time} tokens are too few to look {self.value.ahead} further than the next")
        for number in range(1, self.value.ahead + 1):
            left = time - number
            source = x[:, :left] if self.value.chained else hidden[:, :left]
            own = None if segments is None else segments[:, :left]
            x = self._step(number, body, source, tokens[:, number:], own, padding)
            yield self.steps[number - 1].out(x)  # type: ignore[operator]

    @torch.no_grad()
    def draft(
        self, body: StackModule, hidden: torch.Tensor, tokens: torch.Tensor, padding: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, 1 + ahead) int64: the most probable next token, which is the body's own, and guesses at those after it."""
        known = torch.cat([tokens, body.logits(hidden[:, -1:]).argmax(-1)], dim=1)
        return torch.cat([known[:, -1:], self.continue_from(body, hidden, known, self.value.ahead, padding)], dim=1)

    @torch.no_grad()
    def continue_from(
        self,
        body: StackModule,
        hidden: torch.Tensor,
        tokens: torch.Tensor,
        count: int,
        padding: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, n) int64, n at most `count` and `ahead`: guesses at what follows `tokens` (B, T + 1), all but the last of which
        the body has read: `hidden` (B, T, D)."""
        time, x, known = hidden.shape[1], hidden, tokens
        for number in range(1, min(count, self.value.ahead) + 1):
            source = x if self.value.chained else hidden
            x = self._step(number, body, source, known[:, number : number + time], None, padding)
            guess = body.logits(self.steps[number - 1].out(x[:, -1:])).argmax(-1)  # type: ignore[operator]
            known = torch.cat([known, guess], dim=1)
        return known[:, time + 1 :]

    def cost(self, name: str, context_length: int) -> Cost:
        steps = [step.cost(f"steps.{i}", context_length) for i, step in enumerate(self.steps)]  # type: ignore[operator]
        return _without_state(Cost.sum(name, tuple(steps)))


def _without_state(cost: Cost) -> Cost:
    """The same for a part that reads whole prefixes and remembers nothing."""
    return replace(cost, state_bytes=0.0, fixed_state_bytes=0.0, children=tuple(map(_without_state, cost.children)))


# ---- a model with heads


class Headed(Around):
    """`body` with `heads` by name. `vocab`, `width` and `context` are the body's and need not be given."""

    kind: Literal["headed"] = "headed"
    body: Model
    heads: dict[str, ExtraHead] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _is_its_body(cls, value: Any) -> Any:
        return with_sizes_of(value, "body")

    @model_validator(mode="after")
    def _heads_fit(self) -> "Headed":
        if self.body.counted or self.body.reads_source:
            raise ValueError(f"a model of kind {self.body.kind!r} takes no heads; they are for decoders and encoders")
        for name, head in self.heads.items():
            if not name.isidentifier():
                raise ValueError(f"{name!r} is no name for a head: use letters, digits and _")
            head.check(self.body)
        return self

    @property
    def causal(self) -> bool:
        return self.body.causal

    def module(self) -> "HeadedModule":
        return HeadedModule(self)


class HeadedModule(AroundModule):
    """The module of a `Headed`. `heads["value"](hidden)` and the like read what the model returns."""

    config: Headed

    def __init__(self, config: Headed):
        super().__init__(config, config.body.module())
        self.heads = nn.ModuleDict({name: head.build(config.width) for name, head in config.heads.items()})
        self.complete()

    def forward(
        self,
        tokens: torch.Tensor,
        state: State | None = None,
        segments: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.compute_alike()
        return self.body(tokens, state, segments, padding)

    def classify(self, name: str, tokens: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, labels) float32 of texts (B, T) with `padding` (B,) pads on the left."""
        head = find_head(self, ClassifierModule, name)
        return head(pool(self.body, self(tokens, padding=padding), padding, head.value.pooling))

    def draft(self, tokens: torch.Tensor, hidden: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        """See `MultiTokenModule.draft`; `hidden` (B, T, D) is what the model made of `tokens` (B, T)."""
        assert isinstance(self.body, StackModule)
        return find_head(self, MultiTokenModule).draft(self.body, hidden, tokens, padding)

    def ledger(self, context_length: int | None = None) -> Cost:
        """Of a pass in which every head is asked, as in training."""
        body, length = self.body.ledger(context_length), context_length or self.config.context
        parts = list(body.children)
        for name, head in self.heads.items():
            assert isinstance(head, ExtraHeadModule)
            parts.append(head.cost(f"heads.{name}", length))
            if isinstance(head, MultiTokenModule) and self.output_weight is not None:
                product = 2.0 * head.value.ahead * self.output_weight.numel()
                parts.append(
                    Cost(f"heads.{name}.logits", 0, product, 2.0 * head.value.ahead * self.config.width, shape="shared")
                )
        return Cost.sum(self.config.kind, tuple(parts))


def find_head(model: ModelModule, kind: type[H], name: str | None = None) -> H:
    """The head of a kind, by its name where the model has several. Raises `UserError` where there is none."""
    heads: dict[str, nn.Module] = dict(model.heads.items()) if isinstance(model, HeadedModule) else {}
    found = {key: head for key, head in heads.items() if isinstance(head, kind) and name in (None, key)}
    if len(found) != 1:
        wanted = kind.__name__.removesuffix("Module")
        called = "" if name is None else f" named {name!r}"
        have = ", ".join(heads) or "none"
        raise UserError(f"this needs one {wanted}{called} among the heads of the model, which are: {have}")
    return next(iter(found.values()))
