"""Decoder blocks as one operator: all layers of an engine's step in one call (`kernels/cpp/block.cpp`).

    norm → q, k, v → norm and rotation of heads → pages → attention → out, + x → norm → gate, up → silu · up → down, + x

A small model's token costs a thousand small operators, and calling them costs more than computing them. Where a block has the
common form (pre-norm with RMSNorm, causal attention whose positions are rotary or none, SwiGLU), its matrices are packed, and
nobody looks inside, the operator does what the module's own text does, step by step with the same functions and the same
rounding: the results are equal bit for bit, and the tests hold it to that. All else goes through the module: a block whose
sites are watched does, while its neighbours do not. What it gives up: one form of block is written twice.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from headspring.models import kernels
from headspring.models.attention import AttentionModule
from headspring.models.block import BlockModule, BranchModule
from headspring.models.context import Context
from headspring.models.feedforward import GatedModule
from headspring.models.kernels.packed import Mirror
from headspring.models.kernels.pages import PagesArgument, StepArgument
from headspring.models.norm import RMSNormModule
from headspring.models.paged import Pages
from headspring.models.part import Linear
from headspring.models.position import PositionModule


class BlockArgument(ctypes.Structure):
    """`Block` of kernels/cpp/block.cpp."""

    _fields_ = [
        *((name, Mirror) for name in ("qkv", "out", "both", "down")),
        *((name, ctypes.c_void_p) for name in ("qkv_bias", "out_bias", "both_bias", "down_bias")),
        *((name, ctypes.c_void_p) for name in ("mixer_gain", "head_gains", "feedforward_gain")),
        ("pages", PagesArgument),
        *((name, ctypes.c_int64) for name in ("width", "heads", "window", "group", "rotation")),
        *((name, ctypes.c_float) for name in ("scale", "mixer_epsilon", "head_epsilon", "feedforward_epsilon")),
    ]


class RotationArgument(ctypes.Structure):
    """`Rotation` of kernels/cpp/block.cpp."""

    _fields_ = [("cosines", ctypes.c_void_p), ("sines", ctypes.c_void_p)]


class FusedBlock:
    """What the operator needs of one block, and the modules that it stands for."""

    def __init__(self, block: BlockModule, attention: AttentionModule, gated: GatedModule):
        self.block, self.attention, self.gated = block, attention, gated
        self.parts = [attention.q, attention.k, attention.v, attention.out, gated.gate, gated.up, gated.out]
        self.argument = BlockArgument()
        self._kept: list[torch.Tensor] = []  # what the argument has the addresses of
        self._add_matrices("qkv", attention.q, attention.k, attention.v)
        self._add_matrices("out", attention.out)
        self._add_matrices("both", gated.gate, gated.up)
        self._add_matrices("down", gated.out)
        self._add_norms()
        self.argument.width, self.argument.heads = attention.q.weight.shape[1], attention.heads
        self.argument.window = attention.sliding.window if attention.sliding else 0
        scale = attention.value.scale
        self.argument.scale = attention.channels**-0.5 if scale is None else scale

    @classmethod
    def of(cls, block: BlockModule) -> "FusedBlock | None":
        """None where the operator cannot do what the block does."""
        attention, branch = block.mixes, block.feedforward
        if type(attention) is not AttentionModule or branch is None or type(branch.f) is not GatedModule:
            return None
        if block.parallel or block.cross is not None or not _is_plain(block.mixer) or not _is_plain(branch):
            return None
        if not attention.plain_on_pages or branch.f.activation != "silu" or attention.channels % 32:
            return None
        parts = [module for module in block.modules() if isinstance(module, Linear)]
        whole = attention.q.joined is not None and branch.f.gate.joined is not None
        packed = all(type(part) is Linear and part.packed is not None for part in parts)
        return cls(block, attention, branch.f) if whole and packed and len(parts) == 7 else None

    @property
    def stands(self) -> bool:
        """Whether nobody looks inside or adds to a product. What is looked at before and after is seen between two calls."""
        seen = self.attention.tap is not None or self.gated.tap is not None or "residual.mid" in self.block.watched
        return not seen and all(part.addition is None for part in self.parts)

    def _add_matrices(self, name: str, *parts: Linear) -> None:
        packed = parts[0].joined if len(parts) > 1 else parts[0].packed
        assert packed is not None
        setattr(self.argument, name, packed.mirror)
        biases = [part.bias.detach() for part in parts if part.bias is not None]
        if biases:
            setattr(self.argument, f"{name}_bias", self._keep(torch.cat(biases).to(torch.bfloat16)))

    def _add_norms(self) -> None:
        branches = {"mixer": self.block.mixer, "feedforward": self.block.feedforward}
        for name, branch in branches.items():
            assert branch is not None and isinstance(branch.pre, RMSNormModule)
            setattr(self.argument, f"{name}_gain", self._keep(branch.pre.gain.detach().float()))
            setattr(self.argument, f"{name}_epsilon", branch.pre.epsilon)
        q_norm, k_norm = self.attention.q_norm, self.attention.k_norm
        if isinstance(q_norm, RMSNormModule) and isinstance(k_norm, RMSNormModule):
            pairs = (q_norm, self.attention.heads), (k_norm, self.attention.kv_heads)
            gains = torch.cat([norm.gain.detach().float().expand(count, -1) for norm, count in pairs])
            self.argument.head_gains, self.argument.head_epsilon = self._keep(gains), q_norm.epsilon

    def _keep(self, tensor: torch.Tensor) -> int:
        """The address of a copy that lives as long as this."""
        self._kept.append(tensor.clone(memory_format=torch.contiguous_format))
        return self._kept[-1].data_ptr()


def _is_plain(branch: BranchModule) -> bool:
    """Whether it is x + f(norm(x))."""
    return isinstance(branch.pre, RMSNormModule) and branch.only_adds


class FusedStack:
    """The blocks of a stack as the operator reads them, beside the pages of their `layers`."""

    def __init__(self, blocks: nn.ModuleList, layers: Sequence[Any]):
        self.made_for, own = blocks, [block for block in blocks if isinstance(block, BlockModule)]
        self._places = [(parent._modules, name) for block in own for parent, name in _linears(block)]
        self._made_of = self._state(layers)
        self._blocks = [FusedBlock.of(block) if _readable(pages) else None for block, pages in zip(own, layers)]
        self._arguments = (BlockArgument * len(self._blocks))()
        self.positions: dict[str, PositionModule] = {}
        self.groups: list[int | None] = []
        for index, (block, pages) in enumerate(zip(self._blocks, layers)):
            if block is not None:
                self._arguments[index] = self._placed(block, pages)

    def _placed(self, block: FusedBlock, pages: Pages) -> BlockArgument:
        position = block.attention.position
        self.positions.setdefault(position.key, position)
        if pages.group not in self.groups:
            self.groups.append(pages.group)
        argument = block.argument
        argument.pages, argument.group = PagesArgument.of(pages), self.groups.index(pages.group)
        argument.rotation = list(self.positions).index(position.key)
        return argument

    def _state(self, layers: Sequence[Any]) -> list[Any]:
        """What it is made of: where that is the same, so is this."""
        parts = [part for held, name in self._places for part in (held[name], getattr(held[name], "packed", None))]
        return parts + [pages if isinstance(pages, Pages) else None for pages in layers]

    @classmethod
    def of(cls, blocks: nn.ModuleList, layers: Sequence[Any], x: torch.Tensor, context: Context) -> "FusedStack | None":
        """For a row like `x`, None where nothing can be fused. Made anew where the blocks have been packed anew."""
        first = next((pages for pages in layers if isinstance(pages, Pages)), None) if context.ragged is not None else None
        fits = x.dtype == torch.bfloat16 and not torch.is_grad_enabled() and kernels.multiplies_natively(x)
        if first is None or not fits:
            return None
        made = first.fused
        if made is None or made.made_for is not blocks or made._made_of != made._state(layers):
            made = first.fused = cls(blocks, layers)
        return made

    def reach(self, start: int) -> int:
        """The blocks from `start` up to here can be one call: `start` itself where not even the first can."""
        stop = start
        while stop < len(self._blocks):
            block = self._blocks[stop]
            if block is None or not block.stands or (stop > start and "residual.pre" in block.block.watched):
                break
            stop += 1
            if "residual.post" in block.block.watched:
                break
        return stop

    def run(self, x: torch.Tensor, context: Context, start: int, stop: int) -> torch.Tensor:
        """x (1, N, D) bfloat16 through the blocks start … stop − 1. `reach` has said that it can."""
        first, last = self._blocks[start], self._blocks[stop - 1]
        assert first is not None and last is not None
        x = first.block.site("residual.pre", x).clone(memory_format=torch.contiguous_format)
        step = context.once("a step of fused blocks", lambda: FusedStep(self, context))
        kernels.built().blocks(self._arguments, start, stop, step.argument, x)
        return last.block.site("residual.post", x)


def _readable(pages: Any) -> bool:
    return isinstance(pages, Pages) and pages.keys.dtype in (torch.bfloat16, torch.int8)


class StackStepArgument(ctypes.Structure):
    """`Step` of kernels/cpp/block.cpp."""

    _fields_ = [
        ("sequences", ctypes.POINTER(StepArgument)),
        ("rotations", ctypes.POINTER(RotationArgument)),
        ("groups", ctypes.c_int64),
    ]


class FusedStep:
    """What all blocks share in one step: where the sequences stand and lie, and the angles of their positions."""

    def __init__(self, stack: FusedStack, context: Context):
        ragged = context.ragged
        assert ragged is not None
        self._sequences = (StepArgument * len(stack.groups))(*(StepArgument.of(ragged, group) for group in stack.groups))
        for position in stack.positions.values():
            position.prepare(context)
        self._tables = [position.rotation(context) for position in stack.positions.values()]
        rotations = [RotationArgument(*(table.data_ptr() for table in tables or ())) for tables in self._tables]
        self._rotations = (RotationArgument * len(rotations))(*rotations)
        self.argument = StackStepArgument(self._sequences, self._rotations, len(stack.groups))


def _linears(block: BlockModule) -> list[tuple[nn.Module, str]]:
    """Where the matrices of a block stand."""
    return [(parent, name) for parent in block.modules() for name, part in parent.named_children() if isinstance(part, Linear)]
