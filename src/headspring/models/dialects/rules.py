"""Tensors in two formats, as one table that runs in both directions.

    Rule("model.embed_tokens.weight", "embed.weight")                                   a renaming
    Rule("h.{i}.attn.c_proj.weight", "layers.{i}.mixer.f.out.weight", move=Transposed())  a renaming of other axes
    Rule("….qkv_proj.weight", "….q.weight", "….k.weight", "….v.weight")                 several of ours are rows of one
    Rule(("….experts.0.w1.weight", "….experts.1.w1.weight"), "….gate", move=Stacked())  one of ours is several

What is done to the numbers is a move (`moves`), and every move has an inverse. Why a table and not two functions, as
converters usually are: two functions drift apart, and only one of them is tried when it matters.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from headspring.artifacts.errors import UserError
from headspring.models.dialects.moves import Move, Rows, Shape, moved_shapes

AS_ROWS = Rows()
SHOWN = 3  # names of tensors in an error


@dataclass(frozen=True, init=False)
class Rule:
    """`theirs` and `ours` name tensors that hold the same numbers; `move` takes ours to theirs. `{i}` stands for the layer."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    move: Move

    def __init__(self, theirs: str | Sequence[str], *ours: str, move: Move = AS_ROWS):
        object.__setattr__(self, "theirs", (theirs,) if isinstance(theirs, str) else tuple(theirs))
        object.__setattr__(self, "ours", ours)
        object.__setattr__(self, "move", move)

    def at(self, i: int) -> "Rule":
        """The rule of layer `i`."""
        return Rule([name.format(i=i) for name in self.theirs], *(name.format(i=i) for name in self.ours), move=self.move)

    def prefixed(self, theirs: str = "", ours: str = "") -> "Rule":
        """The same rule of a part that has a longer name."""
        return Rule([theirs + name for name in self.theirs], *(ours + name for name in self.ours), move=self.move)


def expand(rules: Iterable[Rule], layers: int) -> Iterator[Rule]:
    """The rules with every layer's number in place of `{i}`."""
    for rule in rules:
        for i in range(layers) if "{i}" in rule.theirs[0] else (0,):
            yield rule.at(i)


def complete(rules: Sequence[Rule], ours: Mapping[str, object]) -> None:
    """Every one of our tensors has exactly one rule, and no rule speaks of a tensor that does not exist."""
    named = [name for rule in rules for name in rule.ours]
    assert len(named) == len(set(named)) and set(named) == set(ours), sorted(set(named) ^ set(ours))


def their_shapes(rule: Rule, ours: Mapping[str, Shape]) -> list[Shape]:
    """The shapes of the tensors that `rule` makes of ours."""
    return moved_shapes(rule.move, [ours[name] for name in rule.ours])


def check_shapes(rules: Sequence[Rule], ours: Mapping[str, Shape], theirs: Mapping[str, Shape], where: str) -> None:
    """Raise `UserError` for tensors that are missing, left over, or of another size, with their name in both formats."""
    missing = [f"{name} ({_ours(rule)})" for rule in rules for name in rule.theirs if name not in theirs]
    if missing:
        raise UserError(f"{where}: missing {_list(missing)}; the download may be incomplete")
    extra = set(theirs) - {name for rule in rules for name in rule.theirs}
    if extra:
        raise UserError(f"{where}: {_list(sorted(extra))} have no place in a model of this config")
    for rule in rules:
        for name, expected in zip(rule.theirs, their_shapes(rule, ours), strict=True):
            found = tuple(theirs[name])
            if expected != found:
                sizes = f"is {_size(found)}, the config makes it {_size(expected)}"
                raise UserError(f"{where}: {name} ({_ours(rule)}) {sizes}")


def to_ours(rules: Sequence[Rule], theirs: Mapping[str, torch.Tensor], shapes: Mapping[str, Shape]) -> dict[str, torch.Tensor]:
    """Our tensors, from theirs; `shapes` are those of ours, which say where a fused tensor is cut."""
    tensors: dict[str, torch.Tensor] = {}
    for rule in rules:
        given = [theirs[name] for name in rule.theirs]
        parts = rule.move.back(given, [shapes[name] for name in rule.ours])
        for name, part in zip(rule.ours, parts, strict=True):
            # Parts of one tensor share its memory, which a later save would refuse.
            whole = part.is_contiguous() and any(part.data_ptr() == tensor.data_ptr() for tensor in given) and len(parts) == 1
            tensors[name] = part if whole else part.clone(memory_format=torch.contiguous_format)
    return tensors


def to_theirs(rules: Sequence[Rule], ours: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Their tensors, from ours. A renamed tensor is the very same one, not a copy."""
    tensors: dict[str, torch.Tensor] = {}
    for rule in rules:
        tensors.update(zip(rule.theirs, rule.move.out([ours[name] for name in rule.ours]), strict=True))
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _ours(rule: Rule) -> str:
    return f"our {' + '.join(rule.ours)}"


def _size(shape: Shape) -> str:
    return " × ".join(map(str, shape)) or "a single number"


def _list(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
