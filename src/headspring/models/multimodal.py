"""A decoder that also looks and listens: towers make soft tokens, which stand in the place of placeholders of the prompt.

    media["image"] (B, N, C, H, W) → tower ─┐
    tokens (B, T) ─────────────────→ embed ─┴→ blocks → hidden (B, T, D)

A prompt has as many placeholders of a tower as its items make soft tokens, and takes them in order. Without media the model
is its decoder, bit for bit. What it answers is text like any other, and so are pictures that it draws: see `codebook`.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from headspring.artifacts.errors import UserError
from headspring.models.around import Around, AroundModule, with_sizes_of
from headspring.models.decoder import Decoder
from headspring.models.part import Cost
from headspring.models.soft_tokens import SoftTokens
from headspring.models.state import State
from headspring.models.tower import Tower, TowerModule


class Multimodal(Around):
    """`decoder` with `towers` by name ("image", "sound"). `vocab`, `width` and `context` are the decoder's."""

    kind: Literal["multimodal"] = "multimodal"
    decoder: Decoder
    towers: dict[str, Tower] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _is_its_decoder(cls, value: Any) -> Any:
        return with_sizes_of(value, "decoder")

    @model_validator(mode="after")
    def _placeholders_differ(self) -> "Multimodal":
        placeholders = [tower.placeholder for tower in self.towers.values()]
        if len(set(placeholders)) < len(placeholders):
            raise ValueError(f"each tower needs a placeholder of its own, not {placeholders}")
        if max(placeholders) >= self.vocab:
            raise ValueError(f"placeholder {max(placeholders)} is no token of a vocabulary of {self.vocab}")
        for name in self.towers:
            if not name.isidentifier():
                raise ValueError(f"{name!r} is no name for a tower: use letters, digits and _")
        return self

    @property
    def causal(self) -> bool:
        return self.decoder.causal

    def module(self) -> "MultimodalModule":
        return MultimodalModule(self)


class MultimodalModule(AroundModule):
    """The module of a `Multimodal`."""

    config: Multimodal

    def __init__(self, config: Multimodal):
        super().__init__(config, config.decoder.module())
        self.towers = nn.ModuleDict({name: tower.build(config.width) for name, tower in config.towers.items()})
        self.complete()

    def forward(
        self,
        tokens: torch.Tensor,
        state: State | None = None,
        segments: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
        media: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """As every model's. `media` are items (B, N, …) float32 by tower: N for each row, in the order of its placeholders.
        With a state they are given once, at the first call, whichever tokens that has.

        Raises `UserError` where placeholders and items do not fit.
        """
        self.compute_alike()
        soft = self._soft(tokens, state, media)
        if soft is not None and state is None:
            self.check_all_used(soft, tokens, padding)
        return self.body(tokens, state, segments, padding, soft=soft)

    def _soft(self, tokens: torch.Tensor, state: State | None, media: Mapping[str, torch.Tensor] | None) -> SoftTokens | None:
        if not media:
            return None if state is None else state.memory  # type: ignore[return-value]
        if state is not None and state.length:
            raise ValueError("media are given with the first tokens of a state only, which remembers them")
        soft = self.look(media)
        if len(soft.hidden) != len(tokens):
            raise ValueError(f"media for {len(soft.hidden)} rows beside {len(tokens)} rows of tokens")
        if state is not None:
            state.memory = soft
        return soft

    def look(self, media: Mapping[str, torch.Tensor]) -> SoftTokens:
        """The soft tokens of items (B, N, …) float32 by tower."""
        unknown = sorted(set(media) - set(self.towers))
        if unknown:
            raise UserError(f"this model has no tower named {unknown[0]!r}; it has {', '.join(self.towers)}")
        made, spans, end = [], [], 0
        for name, items in media.items():
            tower = self.towers[name]
            assert isinstance(tower, TowerModule)
            made.append(tower(items.flatten(0, 1), self.compute_dtype).unflatten(0, items.shape[:2]).flatten(1, 2))
            spans.append((tower.value.placeholder, end, end := end + made[-1].shape[1]))
        return SoftTokens(torch.cat(made, dim=1), None, tuple(spans))

    def check_all_used(self, soft: SoftTokens, tokens: torch.Tensor, padding: torch.Tensor | None = None) -> None:
        """A picture that no placeholder stands for would be ignored in silence."""
        real = True if padding is None else torch.arange(tokens.shape[1], device=tokens.device) >= padding[:, None]
        for placeholder, start, end in soft.spans:
            found = ((tokens == placeholder) & real).sum(1)
            if bool((found < end - start).any()):
                less = f"{int(found.min())} placeholders (token {placeholder}) for {end - start} vectors"
                raise UserError(f"a prompt has {less}: every picture or sound takes exactly as many as its tower makes")

    def ledger(self, context_length: int | None = None) -> Cost:
        """Of the towers, the parameters: what they compute is per soft token, and how many there are a prompt says."""
        body = self.body.ledger(context_length)
        towers = tuple(
            Cost(f"towers.{name}", sum(p.numel() for p in tower.parameters()), shape=f"{self._pieces(name)} soft tokens")
            for name, tower in self.towers.items()
        )
        return Cost.sum(self.config.kind, (*body.children, *towers))

    def _pieces(self, name: str) -> int:
        return self.config.towers[name].num_pieces
