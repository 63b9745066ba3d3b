"""How weights start, and what has to change with the width of a model so that its rates need not.

| value | hidden matrices | matrices that write to the stream | rates of matrices |
| --- | --- | --- | --- |
| `ZeroOutput` | N(0, 1/inputs) | 0 | 1 |
| `FanIn` | N(0, 1/inputs) | N(0, 1/inputs) / √branches | 1 |
| `GPT2` (Radford et al. 2019) | N(0, 0.02²) | N(0, 0.02²) / √branches | 1 |
| `DeepNorm` (arXiv 2203.00555) | Xavier, times β but for queries and keys | Xavier, times β | 1 |
| `MuP` (arXiv 2203.03466) | N(0, 1/inputs) | N(0, 1/inputs) / √branches | base_width / width |

A part declares its own start with its `ParameterRule`; an `Init` may choose another one for *ordinary* matrices, those
whose rule says how many `inputs` they read, and for embeddings. What has a start of its own (decay rates, convolutions,
orthogonal recurrences) keeps it. Branches are what adds to the stream, as a rule two a layer.

DeepNorm and μP are more than a start: the first multiplies the stream in every branch, the second the scores and logits.
Those factors stand in the model's values, where a reader and a saved config see them; `deepnorm` and `mup` write them.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TypeVar

from pydantic import Field

from headspring.artifacts.value import Variant
from headspring.models.attention import Attention
from headspring.models.block import Block, Branch
from headspring.models.embedding import Head
from headspring.models.norm import LayerNorm, Norm
from headspring.models.part import ParameterRule, normal

if TYPE_CHECKING:
    from headspring.models.stack import Stack
AStack = TypeVar("AStack", bound="Stack")
BETA_FREE = (".q.weight", ".k.weight")  # DeepNorm leaves the matrices of the scores alone


class Init(Variant):
    """Chooses how parameters start. `width` is the model's, `branches` how many add to its stream."""

    def rule(self, name: str, shape: Sequence[int], rule: ParameterRule, width: int, branches: int) -> ParameterRule:
        """The rule of the parameter `name`, in place of what its part declares."""
        raise NotImplementedError

    def check(self, width: int, layers: Sequence[Block], head: Head | None) -> None:
        """Raises `ValueError` for a model that this start is not for."""


class ZeroOutput(Init):
    """Every branch starts as nothing, so that a model starts as its embedding (arXiv 1901.09321 in spirit): the default."""

    kind: Literal["zero_output"] = "zero_output"

    def rule(self, name: str, shape: Sequence[int], rule: ParameterRule, width: int, branches: int) -> ParameterRule:
        return rule


class FanIn(Init):
    """Matrices keep the variance of what they read; the branches together add as much as one."""

    kind: Literal["fan_in"] = "fan_in"

    def rule(self, name: str, shape: Sequence[int], rule: ParameterRule, width: int, branches: int) -> ParameterRule:
        if rule.inputs is None:
            return rule
        return replace(rule, init=normal(rule.inputs**-0.5 / (math.sqrt(branches) if rule.writes else 1.0)))


class GPT2(Init):
    """One spread for all matrices and embeddings; that of matrices that write to the stream divided by √branches."""

    kind: Literal["gpt2"] = "gpt2"
    std: float = Field(0.02, gt=0)

    def rule(self, name: str, shape: Sequence[int], rule: ParameterRule, width: int, branches: int) -> ParameterRule:
        if rule.inputs is None and rule.group not in ("embedding", "head"):
            return rule
        return replace(rule, init=normal(self.std / math.sqrt(branches) if rule.writes else self.std))


class DeepNorm(Init):
    """Xavier with gain β = (4 · branches)^(−1/4), for post-norm branches x ← norm(α x + f(x)) with α = branches^(1/4)."""

    kind: Literal["deepnorm"] = "deepnorm"

    def rule(self, name: str, shape: Sequence[int], rule: ParameterRule, width: int, branches: int) -> ParameterRule:
        if rule.inputs is None:
            return rule
        gain = 1.0 if name.endswith(BETA_FREE) else (4 * branches) ** -0.25
        return replace(rule, init=normal(gain * math.sqrt(2 / (shape[-1] + shape[-2]))))

    def check(self, width: int, layers: Sequence[Block], head: Head | None) -> None:
        alpha = count_branches(layers) ** 0.25
        for branch in (branch for block in layers for branch in block.branches):
            if branch.out is None or branch.pre is not None or not math.isclose(branch.skip, alpha, rel_tol=1e-3):
                raise ValueError(f"deepnorm needs pre: null, out: a norm and skip: {alpha:.4f} in every branch; see deepnorm()")


class MuP(Init):
    """The maximal update parametrisation for Adam: rates found at `base_width` are right at every width.

    At the base width it is `FanIn`. `mup` gives a model the factors that belong to it. Rates of matrices are divided by
    width / base_width under AdamW; Muon's updates need no such factor (arXiv 2310.17813) and are left as they are.
    """

    kind: Literal["mup"] = "mup"
    base_width: int = Field(gt=0)

    def rule(self, name: str, shape: Sequence[int], rule: ParameterRule, width: int, branches: int) -> ParameterRule:
        rule = FanIn().rule(name, shape, rule, width, branches)
        return replace(rule, rate=rule.rate * self.base_width / width) if rule.group == "matrix" else rule

    def check(self, width: int, layers: Sequence[Block], head: Head | None) -> None:
        if width != self.base_width and head is not None and head.scale is None:
            raise ValueError(f"mup of base width {self.base_width} at width {width} needs head.scale; see mup()")


def count_branches(layers: Sequence[Block]) -> int:
    """How many branches add to the stream."""
    return sum(len(block.branches) for block in layers)


def deepnorm(layers: Sequence[Block], norm: Norm | None = None) -> tuple[Block, ...]:
    """The layers as DeepNorm has them: no norm before a branch, one (`norm`, default LayerNorm) after the sum, skip = α.

    For decoders and encoders; goes with `Decoder(layers=deepnorm(…), init=DeepNorm(), norm=None)`.
    """
    alpha, norm = count_branches(layers) ** 0.25, norm or LayerNorm()

    def placed(branch: Branch) -> Branch:
        return Branch(f=branch.f, pre=None, out=norm, skip=alpha)

    def changed(block: Block) -> Block:
        slots = ((name, getattr(block, name)) for name in type(block).model_fields)
        return block.model_copy(update={name: placed(slot) for name, slot in slots if isinstance(slot, Branch)})

    return tuple(changed(block) for block in layers)


def mup(model: AStack, base_width: int, base_head_dim: int | None = None) -> AStack:
    """The model with the factors and rates of μP: `mup(Decoder(width=256, …), base_width=64).build()`.

    Logits are multiplied by base_width / width. Scores are divided by C and not √C, so that they agree with the usual ones
    at heads of `base_head_dim` channels; leave it out where wider models have more heads and not wider ones.
    """

    def scored(block: Block) -> Block:
        attention = block.mixer.f
        if not isinstance(attention, Attention) or base_head_dim is None:
            return block
        scale = base_head_dim**0.5 / (attention.head_dim or model.width // attention.heads)
        branch = block.mixer.model_copy(update={"f": attention.model_copy(update={"scale": scale})})
        return block.model_copy(update={"mixer": branch})

    layers = tuple(scored(block) for block in model.layers)
    head = model.head  # an encoder may have none
    if head is not None:
        head = head.model_copy(update={"scale": (head.scale or 1.0) * base_width / model.width})
    return model.model_copy(update={"layers": layers, "head": head, "init": MuP(base_width=base_width)})
