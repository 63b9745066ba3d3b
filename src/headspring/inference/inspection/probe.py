"""A request's inspection, made ready for one model and one prompt, and what one answer has seen.

`Probe.of` checks everything that could be wrong (names, sizes, positions, memory) when the request arrives: nothing of it can
fail later, in the middle of a batch. Sizes are not written down anywhere: the model is run once on a few tokens, and the shapes
of its sites are kept.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from headspring.artifacts import UserError
from headspring.inference.inspection.request import Ablate, Inspection, Lens, Patch, Steer, unpacked
from headspring.inference.sampling import most_likely
from headspring.models.model import ModelModule
from headspring.models.stack import StackModule

MOST_BYTES = 2**30  # that one answer's captures may take
LENS_ROWS = 64  # whose logits are held at a time

Edit = Callable[[Tensor, int], Tensor]  # rows (n, …) and the position of the first of them → rows
Rows = list[tuple[int, Tensor]]  # runs of rows with the position of their first, in order


@dataclass(frozen=True)
class Readings:
    """What a lens read at one site: the most likely next tokens after each position, ids (T, k) int64 and natural
    log-probabilities (T, k) float32, the best first."""

    ids: Tensor
    logprobs: Tensor


@dataclass(frozen=True)
class Seen:
    """What one answer saw: `activations` by the site's name as it was asked for, (T, …) in the dtype of computation, and
    `lens` by the site's full name. T counts the tokens of the prompt, and of the answer all but the last, which is not read."""

    activations: dict[str, Tensor]
    lens: dict[str, Readings]

    def plain(self) -> dict[str, Any]:
        """As lists, for JSON."""
        return {
            "activations": {name: rows.float().tolist() for name, rows in self.activations.items()},
            "lens": {name: {"ids": one.ids.tolist(), "logprobs": one.logprobs.tolist()} for name, one in self.lens.items()},
        }


@dataclass
class Probe:
    """`key` describes the edits ("" without any): sequences with the same tokens and the same key have the same keys and
    values. `looks` says whether something is captured: then every position has to be computed for this answer."""

    key: str
    looks: bool
    _edits: Mapping[str, tuple[Edit, ...]]
    _asked: Mapping[str, tuple[str, ...]]  # site → the names under which it is captured
    _lens: Mapping[str, Callable[[Tensor], tuple[Tensor, Tensor]]]
    _captured: dict[str, Rows] = field(default_factory=dict)
    _read: dict[str, Rows] = field(default_factory=dict)

    @staticmethod
    def of(model: ModelModule, inspection: Inspection, prompt: int, new: int) -> "Probe":
        """For `prompt` tokens that get at most `new` more. Raises `UserError` for what the model does not have."""
        return _Builder(model, inspection, prompt, prompt + new).probe()

    @property
    def sites(self) -> set[str]:
        """Those that it wants to see."""
        return self._edits.keys() | self._asked.keys() | self._lens.keys()

    def see(self, site: str, rows: Tensor, first: int) -> Tensor:
        """The rows (n, …) of a site from position `first` on → those to go on with, the very same where nothing changes."""
        for edit in self._edits.get(site, ()):
            rows = edit(rows, first)
        if site in self._asked:
            _keep(self._captured.setdefault(site, []), first, rows.clone())
        if site in self._lens:
            ids, logprobs = self._lens[site](rows)
            _keep(self._read.setdefault(site, []), first, torch.cat([ids.double(), logprobs.double()], dim=-1))
        return rows

    def fork(self) -> "Probe":
        """For an answer that goes on from here by itself."""
        captured, read = ({site: list(rows) for site, rows in kept.items()} for kept in (self._captured, self._read))
        return Probe(self.key, self.looks, self._edits, self._asked, self._lens, captured, read)

    def seen(self, length: int) -> Seen:
        """What was seen at the first `length` positions."""
        activations = {
            name: _joined(self._captured.get(site, []), length) for site, names in self._asked.items() for name in names
        }
        readings = {}
        for site in self._lens:
            ids, logprobs = _joined(self._read.get(site, []), length).chunk(2, dim=-1)
            readings[site] = Readings(ids.long(), logprobs.float())
        return Seen(activations, readings)


def _keep(kept: Rows, first: int, rows: Tensor) -> None:
    """Add rows from position `first` on, in the place of what was known from there on."""
    while kept and kept[-1][0] >= first:
        kept.pop()
    if kept and kept[-1][0] + len(kept[-1][1]) > first:
        start, before = kept.pop()
        kept.append((start, before[: first - start]))
    kept.append((first, rows))


def _joined(kept: Rows, length: int) -> Tensor:
    if not kept:
        return torch.empty(0, 0)
    rows = torch.cat([rows for _, rows in kept])
    assert kept[0][0] == 0 and len(rows) >= length, f"positions 0 … {length - 1} were not all seen"
    return rows[:length]


# ---- checking a request and making its edits


_SHAPES: "WeakKeyDictionary[ModelModule, dict[str, torch.Size]]" = WeakKeyDictionary()


@torch.inference_mode()
def row_shapes(model: ModelModule) -> dict[str, torch.Size]:
    """Site → shape of what it holds for one token. Sites that do not have one row a token (the pattern, which no fused kernel
    forms; the memory of a recurrent layer; what an encoder reads) are left out."""
    if model not in _SHAPES:
        lengths = [min(length, model.config.context) for length in (5, 7)]
        first, second = (_shapes(model, length) for length in lengths)
        _SHAPES[model] = {
            site: shape[2:]
            for site, shape in first.items()
            if shape[:2] == (1, lengths[0]) and second[site][:2] == (1, lengths[1]) and not site.startswith("encoder.")
        }
    return _SHAPES[model]


def _shapes(model: ModelModule, length: int) -> dict[str, torch.Size]:
    tokens = torch.zeros(1, length, dtype=torch.int64, device=model.device)
    source = {"source": tokens[:, :3]} if model.config.reads_source else {}
    with model.sites.capture(set(model.sites.names) - model.sites.plain) as seen:
        model(tokens, **source)
    return {site: value.shape for site, value in seen.items()}


class _Builder:
    """Makes the probe of a request, or says in one line why there is none."""

    def __init__(self, model: ModelModule, inspection: Inspection, prompt: int, length: int):
        self.model, self.inspection, self.prompt, self.length = model, inspection, prompt, length
        self.shapes = row_shapes(model)

    def probe(self) -> Probe:
        asked: dict[str, tuple[str, ...]] = {}
        for name in dict.fromkeys(self.inspection.capture):
            asked[self.site(name)] = (*asked.get(self.site(name), ()), name)
        self._check_memory(asked)
        edits: dict[str, tuple[Edit, ...]] = {}
        for one in self.inspection.edits:
            edits[self.site(one.site)] = (*edits.get(self.site(one.site), ()), self._edit(one))
        lens = {} if self.inspection.lens is None else self._lens(self.inspection.lens)
        return Probe(self._key(), self.inspection.looks, edits, asked, lens)

    def site(self, name: str) -> str:
        site = self.model.sites.resolve(name)
        if site not in self.shapes:
            raise UserError(f"site {name!r} has no row for each token in the engine; see it with LanguageModel.capture")
        return site

    def _check_memory(self, asked: Mapping[str, Any]) -> None:
        size = self.length * sum(math.prod(self.shapes[site]) for site in asked) * self.model.compute_dtype.itemsize
        if size > MOST_BYTES:
            limit = f"{MOST_BYTES / 2**20:.0f} MiB are allowed"
            raise UserError(f"captures of {self.length} tokens would take {size / 2**20:.0f} MiB and {limit}; name fewer sites")

    def _key(self) -> str:
        """Edits with the same description do the same: names and positions are written out in full."""
        if not self.inspection.edits:
            return ""
        described = [
            (type(one).__name__, one.model_dump(exclude={"start", "positions"}), self.site(one.site), self._places(one))
            for one in self.inspection.edits
        ]
        return hashlib.blake2b(repr(described).encode(), digest_size=16).hexdigest()

    def _places(self, one: Patch | Ablate | Steer) -> list[int] | None:
        """The positions that it names, counted from the first token; None where it takes all."""
        if isinstance(one, Steer):
            return [self._position(one.start, "start")]
        return None if one.positions is None else [self._position(position, "positions") for position in one.positions]

    def _edit(self, one: Patch | Ablate | Steer) -> Edit:
        if isinstance(one, Steer):
            return self._steer(one)
        return self._patch(one) if isinstance(one, Patch) else self._ablate(one)

    def _steer(self, one: Steer) -> Edit:
        delta = one.scale * self._row(one.vector, one.site, "vector")
        if not bool(delta.isfinite().all()):
            raise UserError(f"steer {one.site}: scale {one.scale} makes the vector larger than float32 holds")
        start = self._position(one.start, "start")

        def steer(rows: Tensor, first: int) -> Tensor:
            before = min(max(start - first, 0), len(rows))
            if before == len(rows):
                return rows
            steered = (rows[before:].float() + delta).to(rows.dtype)
            return steered if before == 0 else torch.cat([rows[:before], steered])

        return steer

    def _patch(self, one: Patch) -> Edit:
        shape, count = self.shapes[self.site(one.site)], len(one.positions)
        values = unpacked(one.values).to(self.model.device)
        if values.numel() not in (math.prod(shape), count * math.prod(shape)):
            raise UserError(f"patch {one.site}: {values.numel()} values for {count} rows of {math.prod(shape)}")
        given = values.view(-1, *shape).expand(count, *shape)
        places = dict(zip(self._places(one) or (), given))

        def patch(rows: Tensor, first: int) -> Tensor:
            inside = [position for position in places if first <= position < first + len(rows)]
            if not inside:
                return rows
            rows = rows.clone()
            for position in inside:
                rows[position - first] = places[position].to(rows.dtype)
            return rows

        return patch

    def _ablate(self, one: Ablate) -> Edit:
        shape = self.shapes[self.site(one.site)]
        gone = torch.ones(shape, dtype=torch.bool, device=self.model.device)
        for name, chosen, dim in (("heads", one.heads, 0), ("channels", one.channels, len(shape) - 1)):
            if chosen is None:
                continue
            if name == "heads" and len(shape) != 2:
                raise UserError(f"ablate {one.site}: it has no heads; name channels or positions")
            if not 0 <= min(chosen) <= max(chosen) < shape[dim]:
                raise UserError(f"ablate {one.site}: {name} are 0 to {shape[dim] - 1}")
            some = torch.zeros(shape[dim], dtype=torch.bool, device=self.model.device)
            some[list(chosen)] = True
            gone &= some[:, None] if name == "heads" else some
        instead = torch.zeros(shape, device=self.model.device) if one.mean is None else self._row(one.mean, one.site, "mean")
        places = None if one.positions is None else set(self._places(one) or ())

        def ablate(rows: Tensor, first: int) -> Tensor:
            mask = gone
            if places is not None:
                here = [first + row in places for row in range(len(rows))]
                if not any(here):
                    return rows
                mask = gone & torch.tensor(here, device=rows.device).view(-1, *[1] * len(shape))
            return torch.where(mask, instead.to(rows.dtype), rows)

        return ablate

    def _row(self, numbers: str, site: str, what: str) -> Tensor:
        shape, row = self.shapes[self.site(site)], unpacked(numbers).to(self.model.device)
        if row.numel() != math.prod(shape):
            raise UserError(f"{site}: {what} has {row.numel()} numbers, and the site {math.prod(shape)} for each token")
        return row.view(shape)

    def _position(self, position: int, what: str) -> int:
        place = position + self.prompt if position < 0 else position
        if not 0 <= place < self.length:
            raise UserError(
                f"{what}: {position} lies outside of prompt and answer, {self.prompt} and {self.length} tokens long"
            )
        return place

    # ---- the logit lens

    def _lens(self, lens: Lens) -> dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]]:
        stack = _stack(self.model)
        if stack is None:
            raise UserError("a lens needs a stack of blocks with a norm and a head behind it, which this model has not")
        if lens.top > self.model.config.vocab:
            raise UserError(f"lens: top={lens.top} of a vocabulary of {self.model.config.vocab}")
        sites = {self.site(self._stream(name)) for name in lens.sites}
        strange = [site for site in sites if not (site.endswith("embed") or ".residual." in site)]
        if strange:
            raise UserError(f"lens: {strange[0]!r} is no site of the residual stream")

        def read(rows: Tensor) -> tuple[Tensor, Tensor]:
            parts = []
            for start in range(0, len(rows), LENS_ROWS):
                some = rows[start : start + LENS_ROWS]
                some = some if stack.norm is None else stack.norm(some)
                parts.append(most_likely(stack.logits(some), lens.top))
            return torch.cat([ids for ids, _ in parts]), torch.cat([logprobs for _, logprobs in parts])

        return dict.fromkeys(sites, read)

    def _stream(self, name: str | int) -> str:
        if isinstance(name, str):
            return name
        stem = "decoder." if self.model.config.reads_source else ""
        count = len({site.split("layers.")[1].split(".")[0] for site in self.shapes if "layers." in site})
        if not -count <= name < count:
            raise UserError(f"lens: layer {name} of {count}")
        return f"{stem}layers.{name % count}.residual.post"


def _stack(model: Any) -> StackModule | None:
    """The stack that predicts tokens, inside of whatever is around it."""
    while not isinstance(model, StackModule):
        model = getattr(model, "body", None) or getattr(model, "decoder", None)
        if model is None:
            return None
    return model
