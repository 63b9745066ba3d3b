"""CUDA graphs for the steps that only write: one launch for the thousand small operators of a token.

    capture, once for each size      buffers  tokens (1, B) · lengths (B,) · tables (B, pages)  →  graph  →  hidden (1, B, D)
    a step                           copy in  │ 5 9 2 · · · · │ 40 7 66 0 0 0 0 0 │ …   replay   copy out the first rows

A step of N sequences with one token each replays the graph for B = N or the next power of two. Rows that stand for nobody write
to a page that nobody owns, and are not looked at. A graph may not know how long sequences are: it reads tables up to a bound,
1024 tokens, 4096, …, and there is one for each bound that occurs. Graphs are captured when they are first wanted.

Everything else runs as it did: prompts, speculation's proposals, sequences that somebody looks into, adapters, models that
remember something beside pages. Sampling, with its penalties and structures, stands behind the graph. Where a model cannot be
captured (a mixture of experts asks the device how many tokens each has), the engine says so once and goes on without.

Why not `torch.compile` with its own graphs: it compiles for a minute, and gives other bits than the same operators one by one.
What this gives up: rows that stand for nobody are computed (a matrix product reads its weights once for all of them), and each
graph keeps the memory of its activations, shared among all graphs.
"""

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Rows
from typing import Any, Protocol

import torch
from torch import Tensor

from headspring.inference.engine.sequence import Work
from headspring.models.paged import BatchState, Pages
from headspring.models.part import PartModule
from headspring.models.ragged import PAGE, Ragged
from headspring.models.stack import StackModule

REACH, GROWS = 1024, 4  # tokens of the shortest bound, and by how much the next is longer


class Backend(Protocol):
    """What captures."""

    def capture(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        """What `run` gives, and what fills that tensor anew from whatever the tensors that `run` read hold then. Raises
        `RuntimeError` where `run` cannot be captured."""
        ...


class CudaBackend:
    """That of PyTorch. All graphs share one pool of memory: no two of them run at a time."""

    def __init__(self) -> None:
        self.pool: Any = None

    def capture(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            run()  # libraries begin, kernels are compiled
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")  # whoever asks the device something is found before the capture breaks
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        here.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):  # a server has other threads
            output = run()
        self.pool = self.pool or graph.pool()
        return output, graph.replay


class Graph:
    """The step of `batch` sequences of up to `reach` tokens, and the buffers that it reads. Until they are filled, every row
    stands for nobody: no token before it, and the page of `nobody` (by group of layers) for its own."""

    def __init__(
        self,
        stack: StackModule,
        layers: Rows[Pages],
        nobody: Mapping[int | None, int],
        batch: int,
        reach: int,
        backend: Backend,
    ):
        self.stack, self.layers, self.nobody, self.batch, self.reach = stack, layers, nobody, batch, reach
        self.device, columns = stack.device, -(-reach // PAGE)
        self.tokens, self.lengths = torch.zeros(2, batch, dtype=torch.int64, device=self.device)
        self.tables = {
            group: torch.full((batch, columns), page, dtype=torch.int32, device=self.device) for group, page in nobody.items()
        }
        self.places = torch.arange(batch + 1, device=self.device)
        self.output, self.replay = backend.capture(self._forward)

    def _forward(self) -> Tensor:
        """(1, batch, D), from the buffers and from nothing that Python knows."""
        ragged = Ragged([0] * self.batch, [1] * self.batch, self.tables, self.device, longest=self.reach)
        ragged.lengths, ragged.offsets, ragged.owners = self.lengths, self.places, self.places[:-1]
        return self.stack(self.tokens[None], state=BatchState(ragged, self.layers))

    def run(self, work: Rows[Work], tables: Mapping[int | None, Tensor]) -> Tensor:
        """Hidden states (N, D) of N ≤ batch sequences with one token each; `tables` (N, any number of pages) lie on the CPU."""
        rows = len(work)
        numbers = [[one.tokens[0] for one in work], [one.sequence.computed for one in work]]
        for buffer, values in zip((self.tokens, self.lengths), torch.tensor(numbers)):
            buffer[:rows].copy_(values)
            buffer[rows:].zero_()
        for group, buffer in self.tables.items():
            told = tables[group][:, : buffer.shape[1]]
            buffer[:rows, : told.shape[1]].copy_(told)
            buffer[rows:, 0] = self.nobody[group]
        self.replay()
        return self.output[0, :rows].clone()  # the next replay writes over it


class Graphs:
    """The graphs of one model on the pages of one runner, whose last page in each group is nobody's."""

    def __init__(
        self, stack: StackModule, layers: Rows[Pages], nobody: Mapping[int | None, int], context: int, backend: Backend
    ):
        self.stack, self.layers, self.nobody, self.context, self.backend = stack, layers, nobody, context, backend
        self.modules = list(stack.modules())
        self.made_of: list[Any] = []
        self.graphs: dict[tuple[int, int], Graph] = {}
        self.off = False

    def takes(self, work: Rows[Work]) -> bool:
        """Whether a step can be replayed."""
        return not self.off and all(map(_only_writes, work)) and not any(_tapped(module) for module in self.modules)

    def run(self, work: Rows[Work], tables: Mapping[int | None, Tensor]) -> Tensor | None:
        """Hidden states (N, D) of a step that `takes` is true of; None where it turns out that the model cannot be captured."""
        parts = [self.stack.compute_dtype, *itertools.chain.from_iterable(map(_held, self.modules))]
        if len(parts) != len(self.made_of) or any(a is not b for a, b in zip(parts, self.made_of)):
            self.graphs.clear()  # they read tensors that the model has no more
            self.made_of = parts
        size = batch_of(len(work)), reach_of(max(one.sequence.computed for one in work) + 1, self.context)
        if size not in self.graphs:
            try:
                self.graphs[size] = Graph(self.stack, self.layers, self.nobody, *size, self.backend)
            except RuntimeError as error:
                self.off = True
                reason = str(error).strip().splitlines()[0]
                warnings.warn(f"this model runs without CUDA graphs: its step cannot be captured ({reason})", stacklevel=2)
                return None
        return self.graphs[size].run(work, tables)


def batch_of(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


def reach_of(length: int, context: int) -> int:
    """The shortest bound for sequences of `length` tokens."""
    reach = REACH
    while reach < length:
        reach *= GROWS
    return min(reach, context)


def _only_writes(work: Work) -> bool:
    """Whether a sequence gets one token, and nobody looks into it or changes how it is computed."""
    sequence = work.sequence
    plain = sequence.probe is None and sequence.job.adapter is None
    return plain and work.count == work.rows == 1 and (sequence.job.soft is None or bool(sequence.request.token_ids))


def _tapped(module: torch.nn.Module) -> bool:
    return isinstance(module, PartModule) and module.tap is not None


def _held(module: torch.nn.Module) -> Iterator[Any]:
    """What a module computes with. Parameters that learn in place stay what they are."""
    yield from module._parameters.values()
    yield from module._buffers.values()
    yield from (vars(module).get(name) for name in ("packed", "joined", "addition"))
