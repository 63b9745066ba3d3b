"""What autograd keeps for a backward pass, counted in execution: the reference of the ledger's activation bytes.

The rule is that of `models.part.Cost`. Operators of `models.kernels` are represented by their definitions, each run as one
operator that saves what it reads (a reentrant checkpoint does just that), so that the count is the same with and without a
compiler; long attention's pieces are made short, and experts get no rows that only fill up their tiles.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch.utils.checkpoint import checkpoint

from headspring.models import attend, grouped, kernels
from headspring.models.mla import MLAModule


def keeps_what_it_reads(definition: Callable) -> Callable:
    def operator(*arguments, **named):
        if not torch.is_grad_enabled():
            return definition(*arguments, **named)
        return checkpoint(functools.partial(definition, **named), *arguments, use_reentrant=True)

    return operator


def _place_heads(mixed, heads, gains, rotation, epsilon=0.0):
    """As the native operator: queries and keys are new, values lie where they were made."""
    q, k, v = kernels.place_heads_plain(mixed, heads, gains, rotation, epsilon)
    return q.clone(), k.clone(), v


@contextmanager
def as_fused() -> Iterator[None]:
    norm = keeps_what_it_reads(kernels.rms_norm_plain)

    def add_norm(x, y, weight, epsilon):
        total = x if y is None else x + y
        return total, norm(total, weight, epsilon)

    halves = keeps_what_it_reads(lambda both: kernels.silu_multiply_plain(*both.chunk(2, dim=-1)))
    replaced = {
        "rms_norm": norm,
        "add_rms_norm": add_norm,
        "silu_multiply": keeps_what_it_reads(kernels.silu_multiply_plain),
        "silu_multiply_halves": halves,
        "clamped_multiply_halves": keeps_what_it_reads(kernels.clamped_multiply_plain),
        "place_heads": keeps_what_it_reads(_place_heads),
    }
    with ExitStack() as stack:
        for name, operator in replaced.items():
            stack.enter_context(patch.object(kernels, name, operator))
        again = lambda f, *arguments, use_reentrant: checkpoint(f, *arguments, use_reentrant=True)
        stack.enter_context(patch.object(attend, "checkpoint", again))
        stack.enter_context(patch.object(attend, "PIECE", 4))
        stack.enter_context(patch.object(grouped, "TILE", 10**9))
        stack.enter_context(patch.object(MLAModule, "absorbs", lambda self, queries, keys: False))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # the next line reads a setting of GPUs, too
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False))  # whose recurrences keep a workspace of their own
        yield


def kept_bytes(model: torch.nn.Module, work: Callable[[int], object], rows: int = 4) -> float:
    """Bytes a row that `work(rows)` keeps for a backward pass, in bfloat16. What does not grow with the rows (weights as they
    were cast, tables, masks) is taken out by doing it for twice as many."""
    once, twice = (_storages(model, functools.partial(work, many)) for many in (rows, 2 * rows))
    return (twice - once) / rows


def _storages(model: torch.nn.Module, work: Callable[[], object]) -> int:
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    alive, sizes = [], {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)  # so that no address is given away twice
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with as_fused(), model.computing_in(torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        result = work()
    alive.append(result)
    return sum(sizes.values())
