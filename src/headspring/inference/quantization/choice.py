"""Which products run on this machine: tested before they are trusted, and timed where there is a choice.

Tested: of every form of matrix in a model (kind, bits, group, sizes), the native product against its definition in plain torch,
bit for bit for whole numbers, and its rows in batches of several sizes against the same rows alone. A kind that fails runs by
its definition from then on, and a warning says so.

Timed: `quantize="auto"` may run a .gguf file's blocks as they are or unpacked to bfloat16. What counts is a token of a whole
model, so the matrices of whole layers are read one after the other, each time after something else has swept the caches. (A
matrix that is still in the cache makes every kernel look good, and the choice wrong: pytorch issue 148494.)

Verdicts are kept in a file in the cache folder, by machine, build, threads and the forms of the matrices; their values play no
part in either question. What it gives up: a machine that is busy when it is asked first may choose the slower one, until its
entry in `products.json` is deleted.
"""

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from headspring.artifacts.files import read_json, write_json
from headspring.models import kernels
from headspring.models.kernels import native
from headspring.models.kernels.packed import PackedMatrix, product_plain
from headspring.models.kernels.packing import pack_for_serving
from headspring.models.model import ModelModule
from headspring.models.moe import Experts

FILE = "products.json"
BATCHES = (1, 3, 8, 33)
REPEATS = 5
SWEEP = 64 << 20  # bytes that are read in between
ENOUGH = 48 << 20  # bytes of matrices that stand for the model
ENTRIES = 1024  # verdicts that are kept; the oldest go


def matrices_of(model: ModelModule) -> list[PackedMatrix]:
    """The packed matrices of a model, in the order in which a token meets them: the whole of joined ones, as many experts
    as a token goes to."""
    found: list[PackedMatrix] = []
    for module in model.modules():
        for names in getattr(module, "joins", ()):
            parts = [getattr(module, name) for name in names]
            whole = parts[0].joined
            found += [whole] if whole is not None else [part.packed for part in parts if part.packed is not None]
        if isinstance(module, Experts) and module.packed_experts is not None:
            packed_experts = module.packed_experts
            for inward, outward in list(zip(packed_experts.inward, packed_experts.outward))[: module.top]:
                found += [*inward, outward]
        joined = {name for names in getattr(module, "joins", ()) for name in names}
        for name, part in module.named_children():
            packed = getattr(part, "packed", None)
            if isinstance(packed, PackedMatrix) and name not in joined and packed is not getattr(model, "packed_head", None):
                found.append(packed)
    head = model.packed_head
    return found if head is None else [*found, head]


# ---- tested


def prepare_for_serving(model: ModelModule) -> dict[str, str]:
    """`pack_for_serving`, and `check_products` of what the model multiplies by."""
    kernels.library()  # where it has to be built, now and not within the first request
    pack_for_serving(model)
    return check_products(matrices_of(model))


def check_products(matrices: Iterable[PackedMatrix]) -> dict[str, str]:
    """What is wrong with native products of these forms, by kind; {} where all is well. Kinds that fail are rejected."""
    forms: dict[tuple, PackedMatrix] = {}
    for matrix in matrices:
        if kernels.multiplies_natively(torch.empty(0, dtype=torch.bfloat16), matrix.kind):
            forms.setdefault(_form(matrix), matrix)
    failures: dict[str, str] = {}
    for form, matrix in forms.items():
        why = remembered("test", [form], lambda matrix=matrix: fault(matrix))  # type: ignore[misc]
        if why is not None:
            failures[matrix.kind] = why
            kernels.rejected_kinds.add(matrix.kind)
            warnings.warn(f"native {matrix.kind} products {why} on this machine; slower plain ones are used", stacklevel=2)
    return failures


@torch.no_grad()
def fault(matrix: PackedMatrix) -> str | None:
    """What is wrong with the native product of a matrix, or None."""
    sample = matrix.part(0, min(matrix.shape[0], 256))  # its first panels compute as all do
    rows = torch.randn(BATCHES[-1], matrix.shape[1], generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    native_y, plain_y = kernels.product(rows, sample), product_plain(rows, sample)
    if matrix.kind != "bf16" and not torch.equal(native_y, plain_y):
        return "differ from their definition"
    if not torch.allclose(native_y.float(), plain_y.float(), rtol=2**-6, atol=2**-6 * float(plain_y.abs().max())):
        return "differ from their definition"
    if any(not torch.equal(kernels.product(rows[:count], sample), native_y[:count]) for count in BATCHES):
        return "give a row other bits in another batch"
    return None


# ---- timed


def fastest(candidates: Mapping[str, Iterable[PackedMatrix]], model: Sequence[PackedMatrix]) -> str:
    """The name of the matrices through which one token passes in the least time. `model` are those whose forms decide."""

    def measured() -> dict[str, float]:
        return {name: timed(matrices) for name, matrices in candidates.items()}

    seconds: dict[str, float] = remembered("time", [sorted(candidates), *map(_form, model)], measured)
    return min(seconds, key=lambda name: seconds[name])


@torch.no_grad()
def timed(matrices: Iterable[PackedMatrix]) -> float:
    """Seconds for one row and a million weights, over the first `ENOUGH` bytes of matrices; the best of `REPEATS`, each with
    cold caches."""
    some: list[PackedMatrix] = []
    for matrix in matrices:
        some.append(matrix)
        if sum(each.bytes for each in some) >= ENOUGH:
            break
    sweep = torch.ones(SWEEP // 4)
    rows = {size: torch.randn(1, size).to(torch.bfloat16) for size in {matrix.shape[1] for matrix in some}}
    best = float("inf")
    for _ in range(REPEATS):
        sweep.add_(1.0)
        start = time.perf_counter()
        for matrix in some:
            kernels.product(rows[matrix.shape[1]], matrix)
        best = min(best, time.perf_counter() - start)
    return best / sum(matrix.shape[0] * matrix.shape[1] / 1e6 for matrix in some)


# ---- remembered


def remembered(question: str, forms: Sequence[Any], answer: Callable[[], Any]) -> Any:
    """The answer in the cache's file, or else `answer()`, which is written there."""
    path = native.cache_folder() / FILE
    key = _key(question, forms)
    try:
        known = read_json(path)
        if isinstance(known, dict) and key in known:
            return known[key]
    except (OSError, ValueError):
        known = {}
    known = known if isinstance(known, dict) else {}
    found = answer()
    known[key] = found
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, dict(list(known.items())[-ENTRIES:]))
    except OSError:  # a cache that cannot be written is asked again next time
        pass
    return found


def _key(question: str, forms: Sequence[Any]) -> str:
    said = json.dumps([question, kernels.numerics_id(), torch.__version__, torch.get_num_threads(), forms], default=list)
    return f"{question}-{hashlib.sha256(said.encode()).hexdigest()[:16]}"


def _form(matrix: PackedMatrix) -> tuple:
    return (*matrix.shape, *matrix.form)
