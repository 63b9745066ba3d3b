"""LoRA adapters as folders in the layout of PEFT: `adapter_config.json` and `adapter_model.safetensors`.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight     (r, I)
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight     (O, r)

Modules have the names of `transformers`, so the dialects' tables of tensors say which matrices of ours are meant. A rule there
moves rows of a weight W about; the rows of B are the rows of B A, so the very same move takes B from one side to the other, and
a matrix that joins several of ours (GPT-2's and Phi-3's q, k, v) gives each of them its rows of B and the same A. Back again,
factors that differ in A become one by standing side by side, which is exact and as wide as they are together. A model for which
`transformers` has no words uses our own names.

A folder is not trusted: never pickle, names and sizes are compared with the base before a tensor is read, patterns are compared
as text and not run as regular expressions. What an adapter may be beside low-rank factors (DoRA, modules saved whole, biases,
trained tokens, experts in one tensor) is refused.
"""

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from headspring.artifacts.errors import CorruptArtifact, UserError
from headspring.artifacts.files import read_json, write_atomic, write_json
from headspring.models.dialects import DIALECTS
from headspring.models.dialects.losses import losses
from headspring.models.dialects.moves import Alternating, Grouped, Move, Pairs, Rows, Shape, Then, Transposed
from headspring.models.dialects.registry import by_name
from headspring.models.dialects.rules import Rule, their_shapes
from headspring.models.dialects.weights import Weights
from headspring.models.lora import Adapter, LowRank, adaptable
from headspring.models.model import ModelModule

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, DOWN, UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
UNSUPPORTED = (  # keys that ask for more than low-rank factors
    *("use_dora", "modules_to_save", "lora_bias", "target_parameters", "layer_replication", "trainable_token_indices"),
    *("alora_invocation_tokens", "use_qalora", "use_bdlora", "megatron_config"),
)
CHANGING_STARTS = ("pissa", "olora", "loftq", "corda", "lora_ga")  # values of init_lora_weights that change the base, too


def is_adapter(folder: str | Path) -> bool:
    """Whether `folder` holds an adapter."""
    return (Path(folder) / CONFIG).is_file()


# ---- reading


def load_adapter(folder: str | Path, model: ModelModule) -> Adapter:
    """The adapter of a folder, for `model`, in the dtype in which it is stored.

    Raises `UserError` for what is no LoRA, is one of a kind that is not supported, or does not fit the model;
    `CorruptArtifact` for damaged files."""
    folder = Path(folder)
    said = _Said(folder)
    weights = _AdapterWeights(folder)
    modules = _modules(weights)
    table = _table_for(modules, model, folder)
    weights.check_dtypes(weights.shapes)
    parts: dict[str, LowRank] = {}
    for module in modules:
        place = table[module]
        _check_sizes(folder, module, place, modules[module].shapes(weights), said.rank(module))
        down, up = (weights.read(name) for name in (modules[module].down, modules[module].up))
        if not bool(down.isfinite().all() and up.isfinite().all()):
            raise UserError(f"{folder / WEIGHTS}: {module} holds numbers that are not finite; get it again")
        for name, rows in zip(place.ours, place.split(up), strict=True):
            parts[name] = LowRank(down, rows, said.alpha(module), said.rslora)
    return Adapter(parts)


@dataclass(frozen=True)
class _Module:
    """The names in the file of one module's factors."""

    down: str
    up: str

    def shapes(self, weights: Weights) -> tuple[Shape, Shape]:
        return weights.shapes[self.down], weights.shapes[self.up]


class _AdapterWeights(Weights):
    def _shards(self) -> dict[Path, set[str] | None]:
        if (self.folder / WEIGHTS).is_file():
            return {self.folder / WEIGHTS: None}
        if any(self.folder.glob("*.bin")):
            raise UserError(f"{self.folder}: adapters in pickle files can run code and are not read; save it as safetensors")
        raise UserError(f"{self.folder}: no {WEIGHTS} here; the download may be incomplete")


class _Said:
    """What adapter_config.json says, checked."""

    def __init__(self, folder: Path):
        self.place = folder / CONFIG
        try:
            said = read_json(self.place)
        except OSError as error:
            raise UserError(f"{folder}: no {CONFIG} here, so no LoRA adapter") from error
        except ValueError as error:
            raise CorruptArtifact(f"{self.place}: not JSON ({error})") from error
        if not isinstance(said, dict) or str(said.get("peft_type", "")).upper() != "LORA":
            kind = said.get("peft_type") if isinstance(said, dict) else None
            raise UserError(f"{self.place}: peft_type = {kind!r} is not supported, only 'LORA'")
        self.said = said
        self._refuse()
        self.rslora = bool(said.get("use_rslora"))
        self.ranks, self.alphas = self._pattern("rank_pattern"), self._pattern("alpha_pattern")

    def _refuse(self) -> None:
        for key in UNSUPPORTED:
            if self.said.get(key):
                raise UserError(f"{self.place}: {key} = {self.said[key]!r} is not supported; merge it with peft and use that")
        if self.said.get("bias", "none") != "none":
            raise UserError(f"{self.place}: bias = {self.said['bias']!r} is not supported, only 'none'")
        start = str(self.said.get("init_lora_weights", True)).lower()
        if start.startswith(CHANGING_STARTS):
            raise UserError(f"{self.place}: init_lora_weights = {start!r} changes the base's own weights; save it with peft's "
                            "path_initial_model_for_weight_conversion")  # fmt: skip

    def _pattern(self, key: str) -> dict[str, Any]:
        found = self.said.get(key) or {}
        if not isinstance(found, dict):
            raise CorruptArtifact(f"{self.place}: {key} is no mapping")
        for pattern in found:
            if not pattern.removeprefix("^").replace("\\.", "").replace(".", "").replace("_", "").isalnum():
                raise UserError(f"{self.place}: {key}: {pattern!r} is a regular expression; write the names of modules in full")
        return {pattern.replace("\\.", "."): value for pattern, value in found.items()}

    def rank(self, module: str) -> Any:
        return self._for(module, self.ranks, "r")

    def alpha(self, module: str) -> float:
        """Of one module, named as `transformers` does."""
        value = self._for(module, self.alphas, "lora_alpha")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"{self.place}: lora_alpha = {value!r} is no number")
        return value

    def _for(self, module: str, patterns: Mapping[str, Any], key: str) -> Any:
        for pattern, value in patterns.items():
            end = pattern.removeprefix("^")
            if module == end or (pattern == end and module.endswith("." + end)):
                return value
        if key not in self.said:
            raise UserError(f"{self.place}: does not say {key}, which a LoRA adapter needs")
        return self.said[key]


def _modules(weights: Weights) -> dict[str, _Module]:
    """The modules that a file adapts, and what their factors are called there."""
    found: dict[str, dict[str, str]] = {}
    for name in weights.shapes:
        end = next((end for end in (DOWN, UP) if name.endswith(end)), None)
        if end is None:
            raise UserError(f"{weights.folder / WEIGHTS}: {name} is not supported, only lora_A and lora_B of matrices")
        found.setdefault(name.removesuffix(end).removeprefix(PREFIX), {})[end] = name
    if not found:
        raise UserError(f"{weights.folder / WEIGHTS}: holds no tensors")
    for module, both in found.items():
        if len(both) != 2:
            raise UserError(f"{weights.folder / WEIGHTS}: {module} has only one of lora_A and lora_B; get it again")
    return {module: _Module(both[DOWN], both[UP]) for module, both in found.items()}


def _check_sizes(folder: Path, module: str, place: "_Place", shapes: tuple[Shape, Shape], rank: Any) -> None:
    down, up = shapes
    wanted = (rank, place.inputs), (place.outputs, rank)
    if (down, up) != wanted:
        sizes = [f"{_size(found)} and must be {_size(right)}" for found, right in zip(shapes, wanted)]
        ours = " + ".join(place.ours)
        raise UserError(f"{folder}: {module} (our {ours}): lora_A is {sizes[0]}, lora_B is {sizes[1]}: another base, or rank")


def _size(shape: Any) -> str:
    return " × ".join(map(str, shape))


# ---- which matrices of ours a module of theirs is


@dataclass(frozen=True)
class _Place:
    """A matrix of theirs: the `ours` that it joins, of `shapes` (Oᵢ, I), and how rows go from ours to it."""

    ours: tuple[str, ...]
    shapes: tuple[Shape, ...]
    move: Move
    transposed: bool  # stored as (I, O)

    @property
    def inputs(self) -> int:
        return self.shapes[0][1]

    @property
    def outputs(self) -> int:
        return sum(shape[0] for shape in self.shapes)

    def split(self, up: Tensor) -> list[Tensor]:
        """B (O, r) of theirs → ours: a matrix with r inputs, as far as the move knows."""
        shapes = [(shape[0], up.shape[1]) for shape in self.shapes]
        parts = self.move.back([up.mT if self.transposed else up], shapes)
        return [part.clone(memory_format=torch.contiguous_format) for part in parts]

    def join(self, ups: list[Tensor]) -> Tensor:
        """The inverse of `split`."""
        (up,) = self.move.out(ups)
        return (up.mT if self.transposed else up).contiguous()


def _table_for(modules: Mapping[str, Any], model: ModelModule, folder: Path) -> dict[str, _Place]:
    """The table that has all of these modules. Raises `UserError` for one that no table has."""
    best: tuple[int, dict[str, _Place]] | None = None
    for table in _tables(model):
        missing = len(modules.keys() - table.keys())
        if missing == 0:
            return table
        best = (missing, table) if best is None or missing < best[0] else best
    assert best is not None
    unknown = min(modules.keys() - best[1].keys())
    near = difflib.get_close_matches(unknown, best[1], 1, cutoff=0.0)
    hint = f"; the nearest is {near[0]}" if near else ""
    raise UserError(f"{folder}: {unknown} is no matrix of this model that can be adapted{hint}")


def _tables(model: ModelModule, family: str | None = None) -> Iterator[dict[str, _Place]]:
    """Names in each dialect that is this model (Llama's and Phi-3's may both be), without and with its prefix; ours at last."""
    shapes: dict[str, Shape] = {name: tuple(part.weight.shape) for name, part in adaptable(model).items()}
    for form in DIALECTS.values() if family is None else [by_name(family)]:
        if not losses(form, model.config):
            places = (_place(rule, shapes) for rule in form.rules(model.config))
            table = dict(filter(None, places))
            yield table
            if form.prefix:
                yield {name.removeprefix(form.prefix): place for name, place in table.items()}
    if family is None:
        yield {name: _Place((name,), (shape,), Rows(), False) for name, shape in shapes.items()}


def _place(rule: Rule, shapes: Mapping[str, Shape]) -> tuple[str, _Place] | None:
    """The matrix that a rule is about; None where it is about something else."""
    names = tuple(name.removesuffix(".weight") for name in rule.ours)
    one = len(rule.theirs) == 1 and rule.theirs[0].endswith(".weight") and all(name in shapes for name in names)
    if not one or not _moves_rows(rule.move):
        return None
    inputs = 1 + sum(shapes[name][0] for name in names)  # no number of outputs can be taken for it
    (theirs,) = their_shapes(rule, {name: (shapes[end][0], inputs) for name, end in zip(rule.ours, names)})
    place = _Place(names, tuple(shapes[name] for name in names), rule.move, transposed=theirs[0] == inputs)
    return rule.theirs[0].removesuffix(".weight"), place


def _moves_rows(move: Move, last: bool = True) -> bool:
    """Whether nothing happens to inputs, but for the transposition of all at the end."""
    if isinstance(move, Then):
        return _moves_rows(move.first, last=False) and _moves_rows(move.second, last)
    if isinstance(move, Transposed):
        return last
    return isinstance(move, Grouped | Pairs) or (isinstance(move, Rows | Alternating) and move.axis == 0)


# ---- writing


def save_adapter(
    adapter: Adapter, model: ModelModule, folder: str | Path, base: str | None = None, family: str | None = None
) -> None:
    """Write `adapter` as PEFT reads it, with the names that `model` has in `transformers` (our own, where it has none there).

    `base` says which model it is for, `family` an architecture (`Phi3ForCausalLM`); by default the first that expresses the
    model. Tensors keep their dtype. Raises `UserError` where the adapter does not fit `model`, or the model not the family."""
    adapter.check(model)
    table = next((table for table in _tables(model, family) if table), None)
    if table is None:
        raise UserError(f"{family} cannot express this model, so its names mean nothing here")
    joined = {module: whole for module, place in table.items() if (whole := _joined(place, adapter)) is not None}
    tensors: dict[str, Tensor] = {}
    for module, part in joined.items():
        tensors[PREFIX + module + DOWN] = part.down.detach().cpu().contiguous()
        tensors[PREFIX + module + UP] = part.up.detach().cpu().contiguous()
    folder = Path(folder)
    transposed = any(table[module].transposed for module in joined)
    write_atomic(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_json(folder / CONFIG, _config(joined, table, base, transposed))


def _joined(place: _Place, adapter: Adapter) -> LowRank | None:
    """The factors of a matrix that joins several of ours; None where none of them is adapted."""
    parts = [adapter.parts.get(name) for name in place.ours]
    first = next((part for part in parts if part is not None), None)
    if first is None:
        return None
    given = [part for part in parts if part is not None]
    alike = len(given) == len(parts) and all(part.scale == first.scale for part in given)
    if alike and all(part.down.shape == first.down.shape and torch.equal(part.down, first.down) for part in given):
        return LowRank(first.down, place.join([part.up for part in given]), first.alpha, first.rslora)
    return _side_by_side(place, parts, given)


def _side_by_side(place: _Place, parts: list[LowRank | None], given: list[LowRank]) -> LowRank:
    """One pair of factors as wide as all together: every part's own A, and its B where its rows meet its A."""
    down, scale = torch.cat([part.down for part in given]), given[0].scale
    ups, start = [], 0
    for part, shape in zip(parts, place.shapes, strict=True):
        up = down.new_zeros(shape[0], len(down))
        if part is not None:
            factor = 1.0 if part.scale == scale else part.scale / scale
            up[:, start : start + part.rank] = factor * part.up
            start += part.rank
        ups.append(up)
    rslora = given[0].rslora
    return LowRank(down, place.join(ups), scale * (math.sqrt(len(down)) if rslora else len(down)), rslora)


def _config(joined: Mapping[str, LowRank], table: Mapping[str, Any], base: str | None, transposed: bool) -> dict[str, Any]:
    first = next(iter(joined.values()))
    rslora = first.rslora
    if any(part.rslora != rslora for part in joined.values()):
        raise UserError("some matrices are scaled by √rank and some by rank, for which an adapter's folder has no words")
    ends = {module.rpartition(".")[2] for module in joined}
    whole = all(module in joined for module in table if module.rpartition(".")[2] in ends)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": rslora,
        "use_dora": False,
        "fan_in_fan_out": transposed,
        "target_modules": sorted(ends) if whole else sorted(joined),
        "rank_pattern": {module: part.rank for module, part in joined.items() if part.rank != first.rank},
        "alpha_pattern": {module: part.alpha for module, part in joined.items() if part.alpha != first.alpha},
    }
