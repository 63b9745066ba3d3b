"""What a model computes on its way, by name and in order: the output of every matrix and norm, and every site.

A model of `transformers` is seen through its dialect: the table that renames tensors also says which of its modules is which
of ours, and how the channels of a fused one are cut. So the two can be laid side by side without a list of names for each
family.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from headspring.models.block import BranchModule
from headspring.models.dialects.moves import Move, Shape
from headspring.models.dialects.rules import Rule
from headspring.models.embedding import EmbedModule
from headspring.models.model import ModelModule
from headspring.models.norm import NormModule
from headspring.models.part import Linear

Seen = dict[str, torch.Tensor]
LOGITS = "logits"
FIRST = ("q", "k", "v", "gate", "up")  # what a part does to its input, where it has a matrix of that name


@torch.no_grad()
def observe(model: ModelModule, tokens: torch.Tensor) -> Seen:
    """Everything that can be seen in a forward pass on tokens (B, T) int64, float32, in the order in which it is computed."""
    seen: Seen = {}
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, Linear | NormModule | EmbedModule):
                stack.callback(module.register_forward_hook(_keep(seen, name)).remove)
            elif isinstance(module, BranchModule):
                stack.callback(module.f.register_forward_pre_hook(_take_apart(seen, name, module)).remove)
        stack.enter_context(model.sites.edit({name: _look(seen, name) for name in model.sites.names}))
        hidden = model(tokens)
        seen[LOGITS] = model.logits(hidden).detach()
    return seen


@torch.no_grad()
def observe_reference(model: Any, rules: Iterable[Rule], shapes: dict[str, Shape], tokens: torch.Tensor) -> Seen:
    """The same of a model of `transformers`, as far as its modules are ours. `shapes` are those of our tensors.

    Its table of embeddings is left out where ours adds positions or a norm to it.
    """
    seen: Seen = {}
    plain = not any(name.startswith("embed.") for name in shapes if name != "embed.weight")
    with ExitStack() as stack:
        for theirs, ours, move in _modules(rules):
            try:
                module = model.get_submodule(theirs)
            except AttributeError:
                continue
            if ours == ("embed.weight",) and not plain:
                continue
            sizes = [shapes[name] for name in ours]
            names = [name.removesuffix(".weight") for name in ours]
            stack.callback(module.register_forward_hook(_keep_parts(seen, names, [size[0] for size in sizes], move)).remove)
        seen[LOGITS] = model(tokens).logits.float()
    return seen


def _modules(rules: Iterable[Rule]) -> Iterator[tuple[str, tuple[str, ...], Move]]:
    """Their modules, the weights of ours that they hold, and what was done to the rows. A bias, which is never transposed,
    says that better than a weight."""
    found: dict[str, tuple[tuple[str, ...], Move]] = {}
    for rule in rules:
        theirs, dot, kind = rule.theirs[0].rpartition(".")
        if len(rule.theirs) == 1 and dot and (kind == "bias" or (kind == "weight" and theirs not in found)):
            ours = tuple(name.removesuffix(".bias").removesuffix(".weight") + ".weight" for name in rule.ours)
            found[theirs] = (ours, rule.move)
    return ((theirs, ours, move) for theirs, (ours, move) in found.items())


def _keep(seen: Seen, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        seen[name] = output.detach().float()

    return hook


def _take_apart(seen: Seen, name: str, branch: BranchModule) -> Callable[..., None]:
    """A branch computes its norm and its first matrices as one operator: here they run on their own, and their hooks see it."""

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0]
        if branch.pre is not None:
            seen[f"{name}.pre"] = x.detach().float()
        made = {part: getattr(branch.f, part)(x) for part in FIRST if isinstance(getattr(branch.f, part, None), Linear)}
        for part in ("q", "k"):
            norm = getattr(branch.f, f"{part}_norm", None)
            if part in made and isinstance(norm, NormModule):
                norm(made[part].unflatten(-1, (-1, norm.width)))

    return hook


def _look(seen: Seen, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    def look(value: torch.Tensor) -> torch.Tensor:
        seen[name] = value.detach().float()
        return value

    return look


def _keep_parts(seen: Seen, names: list[str], channels: list[int], move: Move) -> Callable[..., None]:
    """Cut the output of a fused module into what ours put out."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        rows = output.detach().float().clone().movedim(-1, 0)  # what follows may write into it
        if len(names) == 1 and channels[0] != len(rows):  # an embedding: its rows are tokens, not channels
            seen[names[0]] = rows.movedim(0, -1)
            return
        try:
            parts = move.back([rows], [(size, *rows.shape[1:]) for size in channels])
        except RuntimeError:  # a move of weights that outputs do not have
            return
        for name, size, part in zip(names, channels, parts, strict=True):
            if len(part) == size:
                seen[name] = part.movedim(0, -1)

    return hook
