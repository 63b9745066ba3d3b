"""Names of tensors in two formats, as one table that runs in both directions.

    Rule("model.layers.{i}.self_attn.q_proj.weight", "layers.{i}.mixer.f.q.weight")                        a renaming
    Rule("model.layers.{i}.self_attn.qkv_proj.weight", *("layers.{i}.mixer.f." + x for x in ("q.weight", …)))  a fusion

A fused tensor is the rows of several of ours, one after another. Renaming and cutting rows move values and never compute
with them, so that `export(import(w)) == w` bit for bit. Why a table and not two functions, as converters usually are:
two functions drift apart, and only one of them is tried when it matters.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from headspring.artifacts.errors import UserError

Shape = tuple[int, ...]
SHOWN = 3  # names of tensors in an error


@dataclass(frozen=True, init=False)
class Rule:
    """`theirs` is the one tensor of `ours`, or the rows of all of them in order. `{i}` stands for the layer."""

    theirs: str
    ours: tuple[str, ...]

    def __init__(self, theirs: str, *ours: str):
        object.__setattr__(self, "theirs", theirs)
        object.__setattr__(self, "ours", ours)


def expand(rules: Sequence[Rule], layers: int) -> Iterator[Rule]:
    """The rules with every layer's number in place of `{i}`."""
    for rule in rules:
        for i in range(layers) if "{i}" in rule.theirs else (0,):
            yield Rule(rule.theirs.format(i=i), *(name.format(i=i) for name in rule.ours))


def complete(rules: Sequence[Rule], ours: Mapping[str, object]) -> None:
    """Every one of our tensors has exactly one rule, and no rule speaks of a tensor that does not exist."""
    named = [name for rule in rules for name in rule.ours]
    assert len(named) == len(set(named)) and set(named) == set(ours), sorted(set(named) ^ set(ours))


def their_shape(rule: Rule, ours: Mapping[str, Shape]) -> Shape:
    """The shape of the tensor that `rule` makes of ours."""
    first = ours[rule.ours[0]]
    return (sum(ours[name][0] for name in rule.ours), *first[1:])


def check_shapes(rules: Sequence[Rule], ours: Mapping[str, Shape], theirs: Mapping[str, Shape], where: str) -> None:
    """Raise `UserError` for tensors that are missing, left over, or of another size, with their name in both formats."""
    missing = [rule for rule in rules if rule.theirs not in theirs]
    if missing:
        raise UserError(f"{where}: missing {_list(_both(rule) for rule in missing)}; the download may be incomplete")
    extra = set(theirs) - {rule.theirs for rule in rules}
    if extra:
        raise UserError(f"{where}: {_list(sorted(extra))} have no place in a model of this config")
    for rule in rules:
        expected, found = their_shape(rule, ours), tuple(theirs[rule.theirs])
        if expected != found:
            raise UserError(f"{where}: {_both(rule)} is {_size(found)}, the config makes it {_size(expected)}")


def to_ours(
    rules: Sequence[Rule], theirs: Mapping[str, torch.Tensor], shapes: Mapping[str, Shape]
) -> dict[str, torch.Tensor]:
    """Our tensors, from theirs; `shapes` are those of ours, which say where a fused tensor is cut."""
    tensors: dict[str, torch.Tensor] = {}
    for rule in rules:
        parts = theirs[rule.theirs].split([shapes[name][0] for name in rule.ours])
        # Parts of one tensor share its memory, which a later save would refuse.
        parts = [part.clone() for part in parts] if len(parts) > 1 else parts
        tensors.update(zip(rule.ours, parts, strict=True))
    return tensors


def to_theirs(rules: Sequence[Rule], ours: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Their tensors, from ours."""
    return {rule.theirs: torch.cat([ours[name] for name in rule.ours]) for rule in rules}


def _both(rule: Rule) -> str:
    return f"{rule.theirs} (our {' + '.join(rule.ours)})"


def _size(shape: Shape) -> str:
    return " × ".join(map(str, shape))


def _list(names: Iterator[str] | Sequence[str]) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
