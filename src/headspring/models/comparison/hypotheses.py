"""The usual mistakes, each as a change of a model's value or of its tensors that would make it the other model.

A hypothesis is tried and not argued: the changed model runs on the same tokens, and the mistake is named if the place that
differed is then equal. So a name that comes out is never a guess; what this gives up are mistakes that are not on the list,
and two mistakes in the same place.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError

from headspring.models.dialects.losses import explicit
from headspring.models.dialects.moves import Grouped, Pairs, Rows
from headspring.models.feedforward import ACTIVATIONS
from headspring.models.model import Model
from headspring.models.stack import Stack

Tensors = Mapping[str, torch.Tensor]
Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Hypothesis:
    """`cause` reads on from "there": what the other model does, in one line."""

    cause: str
    config: Model
    tensors: Tensors


def differences(here: Any, there: Any, path: Path = ()) -> Iterator[tuple[Path, Any, Any]]:
    """Where two contents of values differ: path, ours, theirs. Parts of two kinds differ as a whole."""
    if isinstance(here, dict) and isinstance(there, dict) and here.get("kind") == there.get("kind"):
        for key in here.keys() | there.keys():
            yield from differences(here.get(key), there.get(key), (*path, key))
    elif isinstance(here, list) and isinstance(there, list) and len(here) == len(there):
        for index, pair in enumerate(zip(here, there)):
            yield from differences(*pair, (*path, index))
    elif here != there:
        yield path, here, there


def known(config: Stack, tensors: Tensors, other: Model, others: Tensors, scope: Path) -> Iterator[Hypothesis]:
    """Settings inside `scope` in which the other model's own value differs, one at a time."""
    here, there = explicit(config), explicit(other)
    for path, mine, theirs in sorted(differences(here, there), key=lambda found: str(found[0])):
        if not _inside(path, scope):
            continue
        changed = with_setting(config, path, theirs)
        if changed is not None:
            yield Hypothesis(f"{_dotted(path)} is {_shown(theirs)}, and {_shown(mine)} here", changed, {**others, **tensors})


def settings(config: Stack, tensors: Tensors, scope: Path) -> Iterator[Hypothesis]:
    """Settings inside `scope` set to what people usually confuse them with."""
    for path, value in leaves(explicit(config)):
        if not _inside(path, scope):
            continue
        for candidate in alternatives(path, value, config):
            changed = with_setting(config, path, candidate)
            if changed is not None and candidate != value:
                text = f"{_dotted(path)} seems to be {_shown(candidate)}, and is {_shown(value)} here"
                yield Hypothesis(WORDS.get(str(path[-1]), "") + text, changed, tensors)


def _inside(path: Path, scope: Path) -> bool:
    """Whether a setting belongs to what is looked at: a layer or a branch of it, or (no scope) what is in no layer."""
    return path[: len(scope)] == scope if scope else path[0] != "layers"


WORDS = {"plus_one": "the gain of a norm is taken as 1 + w or as w: "}
FIXED: dict[str, tuple[Any, ...]] = {
    "epsilon": (1e-5, 1e-6, 1e-8, 1e-12, 1e-3),
    "plus_one": (True, False),
    "theta": (1e4, 5e5, 1e6, 1.5e5, 1e5, 5e6),
    "fraction": (0.25, 0.5, 1.0),
    "activation": tuple(ACTIVATIONS),
    "parallel": (True, False),
    "renormalise": (True, False),
    "softcap": (None, 20.0, 30.0, 50.0),
}


def alternatives(path: Path, value: Any, config: Stack) -> tuple[Any, ...]:
    """What the setting at `path` might be instead of `value`."""
    name, width = path[-1], config.width
    if name == "window" and value is not None:
        return (value - 1, value + 1, None)
    if path[:2] == ("embed", "scale"):
        return (None, width**0.5)
    if name == "scale" and path[0] == "layers":
        channels = (value or width**-0.5) ** -2
        return (1.0, channels**-1, width**-0.5, (2 * channels) ** -0.5, (channels / 2) ** -0.5)
    return FIXED.get(str(name), ())


def moved(config: Stack, tensors: Tensors, prefix: str) -> Iterator[Hypothesis]:
    """Tensors whose names start with `prefix`, laid otherwise."""
    for name in [name for name in tensors if name.startswith(prefix)]:
        tensor = tensors[name]
        if name.endswith(".bias"):
            yield Hypothesis(f"{name} is missing (all zero)", config, {**tensors, name: torch.zeros_like(tensor)})
        if tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1]:
            yield Hypothesis(f"{name} is transposed", config, {**tensors, name: tensor.mT})
        if tensor.dim() == 1 and name.endswith(".weight"):
            yield Hypothesis(f"{name}: the gain of a norm is stored minus one (1 + w)", config, {**tensors, name: tensor - 1})
            yield Hypothesis(f"{name}: the gain of a norm is stored plus one", config, {**tensors, name: tensor + 1})
    yield from _attention(config, tensors, prefix)
    gate, up = (f"{prefix}.f.{x}.weight" for x in ("gate", "up"))
    if gate in tensors and up in tensors:
        yield Hypothesis("gate and up have changed places", config, {**tensors, gate: tensors[up], up: tensors[gate]})


def _attention(config: Stack, tensors: Tensors, prefix: str) -> Iterator[Hypothesis]:
    """Rotary pairs, and the order of queries, keys and values in one matrix."""
    kinds = [kind for kind in ("weight", "bias") if f"{prefix}.f.q.{kind}" in tensors and f"{prefix}.f.k.{kind}" in tensors]
    if not kinds or not prefix.startswith("layers."):
        return
    attention: Any = config.layers[int(prefix.split(".")[1])].mixer.f
    heads = {"q": attention.heads, "k": attention.kv_heads or attention.heads}
    for way, text in (("out", "neighbours (2c, 2c + 1)"), ("back", "halves that stand as neighbours here")):
        changed = dict(tensors)
        for kind, (x, count) in itertools.product(kinds, heads.items()):
            rows = tensors[name := f"{prefix}.f.{x}.{kind}"]
            turn = Pairs(count)
            changed[name] = turn.out([rows])[0] if way == "out" else turn.back([rows], [tuple(rows.shape)])[0]
        yield Hypothesis(f"rotary pairs of q and k are {text}, halves (c, c + C/2) here", config, changed)
    for order in itertools.permutations("qkv"):
        for groups in sorted({0, heads["k"]}):
            if order != ("q", "k", "v") or groups:
                text = f"the fused matrix is cut as [{', '.join(order)}]" + (f", in {groups} groups" if groups else "")
                yield Hypothesis(text, config, {**tensors, **_recut(tensors, prefix, kinds, order, groups)})


def _recut(tensors: Tensors, prefix: str, kinds: list[str], order: tuple[str, ...], groups: int) -> Tensors:
    """q, k and v as they come out where rows that were fused in this order are cut as if they were [q, k, v]."""
    changed: dict[str, torch.Tensor] = {}
    for kind in kinds:
        names = {x: f"{prefix}.f.{x}.{kind}" for x in "qkv"}
        fused = (Grouped(groups) if groups else Rows()).out([tensors[names[x]] for x in order])
        parts = Rows().back(fused, [tuple(tensors[names[x]].shape) for x in "qkv"])
        changed.update(zip(names.values(), parts, strict=True))
    return changed


def with_setting(config: Model, path: Path, value: Any) -> Stack | None:
    """The same value with another setting; None where that cannot be."""
    content = config.model_dump(mode="json")
    place: Any = content
    for step in path[:-1]:
        place = place[step]
        if place is None:
            return None
    place[path[-1]] = value
    try:
        changed = Model.choose(content)
    except ValidationError:
        return None
    return changed if isinstance(changed, Stack) else None


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every setting of a content, with its path."""
    if isinstance(value, dict | list):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(child, (*path, key))
    else:
        yield path, value


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return str(value.get("kind", "a value"))
    return f"{value:.6g}" if isinstance(value, float) else "none" if value is None else str(value)
