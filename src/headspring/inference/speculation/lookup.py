"""Prompt lookup: what came next, the last time the text stood here."""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

from torch import Tensor

from headspring.inference.generation import Request


class Index:
    """Where each run of `shortest` … `longest` tokens in a growing text was last seen: the place after it."""

    def __init__(self, longest: int, shortest: int):
        self.lengths = range(longest, shortest - 1, -1)
        self.places: dict[tuple[int, ...], int] = {}
        self.tokens: list[int] = []

    def grow(self, tokens: Sequence[int]) -> None:
        """Add tokens. The run that ends the text is not indexed before something follows it."""
        for token in tokens:
            end = len(self.tokens)
            for length in self.lengths:
                if length <= end:
                    self.places[tuple(self.tokens[end - length :])] = end
            self.tokens.append(token)

    def after(self, limit: int) -> list[int]:
        """At most `limit` tokens that followed the longest run that also ends the text; none where there is no such run."""
        for length in self.lengths:
            place = self.places.get(tuple(self.tokens[len(self.tokens) - length :])) if length <= len(self.tokens) else None
            if place is not None:
                return self.tokens[place : place + limit]
        return []


class Lookup:
    """A proposer from the text alone."""

    def __init__(self, longest: int, shortest: int):
        self._longest, self._shortest = longest, shortest
        self._indices: WeakKeyDictionary[Request, Index] = WeakKeyDictionary()

    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[list[int]]:
        return [self._propose(request, limit) if limit else [] for request, limit in zip(requests, limits, strict=True)]

    def _propose(self, request: Request, limit: int) -> list[int]:
        index = self._indices.get(request)
        if index is None:
            index = self._indices[request] = Index(self._longest, self._shortest)
            index.grow(request.source)
            index.grow(request.prompt)
        known = len(index.tokens) - len(request.source) - len(request.prompt)
        index.grow(request.token_ids[known:])
        return index.after(limit)

    def observe(self, request: Request, hidden: Tensor) -> None:
        """It needs no hidden states."""
