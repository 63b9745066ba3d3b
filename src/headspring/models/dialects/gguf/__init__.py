"""GGUF, the one-file format of llama.cpp: models in and out. The tokenizer in such a file is read by `tokenization`.

A file becomes a model like any other: `families` says what its names mean, `blocks` what its bytes mean. Reading back
what was written gives the same bits for float32, float16 and bfloat16; the block formats round.
"""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headspring.artifacts.errors import UserError
from headspring.artifacts.gguf import Entry, GgufFile, write_gguf
from headspring.models.dialects import empty
from headspring.models.dialects.gguf.blocks import FILE_TYPES, WRITTEN, Type, dtype_of, pack, read, type_for
from headspring.models.dialects.gguf.families import ARCHITECTURE, FACTORS, GGUF_FAMILIES, TIED, GgufFamily
from headspring.models.dialects.gguf.groups import keeps, read_groups
from headspring.models.dialects.losses import distance, losses
from headspring.models.dialects.rules import Rule, check_shapes, complete, their_shapes, to_ours, to_theirs
from headspring.models.model import Model, ModelModule
from headspring.models.quantized import QuantizedMatrix

SHOWN = 3  # fields in an error
QUANTIZATION_VERSION = 2  # of the block formats; GGML_QNT_VERSION of ggml
OUTSIDE = ("token_embd.weight", "output.weight")
STRETCH = "rope_freqs.weight"  # what `FACTORS` says

__all__ = ["WRITTEN", "export_gguf", "import_gguf", "read_gguf"]


def import_gguf(path: str | Path, dtype: torch.dtype | None = None) -> ModelModule:
    """The model in a GGUF file, in `dtype`, or else in the one its matrices are stored in (quantized ones: float32).

    Raises `UserError` for an architecture, a setting or a number format that is not supported, `CorruptArtifact` for a
    damaged file. Sizes are compared with the file's before memory is taken for them.
    """
    return read_gguf(path, dtype)[0]


def read_gguf(
    path: str | Path, dtype: torch.dtype | None = None, keep: bool = False
) -> tuple[ModelModule, dict[str, QuantizedMatrix]]:
    """`import_gguf`, and where `keep` the matrices that the file holds in blocks, by the name of their parameter; in the model
    NaN takes their place."""
    file = GgufFile(path)
    tensors = {name: info.shape for name, info in file.tensors.items()}
    try:
        family = _family(file)
        facts = _facts(file, family)
        value = family.read(facts, most=len(tensors))
        model = empty(value)
    except UserError as error:
        raise UserError(f"{file.path}: {str(error).replace('config.json', 'its metadata')}") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if FACTORS in facts:
        del tensors[STRETCH]
    rules = list(family.rules(value))
    complete(rules, shapes)
    check_shapes(rules, shapes, tensors, str(file.path))
    kept = [rule for rule in rules if keep and all(keeps(file, name) for name in rule.theirs)]
    kept = [rule for rule in kept if _siblings(rule, rules) <= set(kept)]
    plain = [rule for rule in rules if rule not in kept]
    theirs = {name: read(file, name, dtype or dtype_of(file)) for rule in plain for name in rule.theirs}
    matrices = {name: matrix for rule in kept for name, matrix in _moved(rule, file, shapes)}
    stand_ins = {name: torch.full((1,), torch.nan).expand(shapes[name]) for name in matrices}
    model.load_state_dict({**to_ours(plain, theirs, shapes), **stand_ins}, assign=True)
    return model, matrices


def _siblings(rule: Rule, rules: Sequence[Rule]) -> set[Rule]:
    """The rules of the same experts, whose matrices are whole numbers together or not at all."""
    owner = rule.ours[0].rpartition(".")[0]
    return {other for other in rules if other.ours[0].rpartition(".")[0] == owner} if owner.endswith(".experts") else {rule}


def _moved(rule: Rule, file: GgufFile, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, QuantizedMatrix]]:
    """The matrices of a rule in our order. Moves of this format permute and cut rows only, and scales belong to rows."""
    (name,) = rule.theirs
    matrix = read_groups(file, name)

    def back(part: torch.Tensor) -> list[torch.Tensor]:
        return rule.move.back([part], [(math.prod(shapes[ours][:-1]), part.shape[1]) for ours in rule.ours])

    minimums = [None] * len(rule.ours) if matrix.minimums is None else back(matrix.minimums)
    for ours, values, scales, minimum in zip(rule.ours, back(matrix.values), back(matrix.scales), minimums, strict=True):
        yield ours, QuantizedMatrix(values.contiguous(), scales.contiguous(), minimum, matrix.bits)


def export_gguf(
    model: ModelModule, path: str | Path, dtype: str | None = None, metadata: Mapping[str, Any] | None = None
) -> str:
    """Write a GGUF file, and return its architecture.

    `dtype` is a key of `WRITTEN` for the matrices (None: as they are); vectors are written in float32, as llama.cpp wants
    them. `metadata` is added, such as a tokenizer's. Raises `UserError` naming the fields that the format has no words
    for.
    """
    if dtype is not None and dtype not in WRITTEN:
        raise UserError(f"dtype {dtype!r} cannot be written to GGUF; use {', '.join(WRITTEN)}")
    family = _lossless(model.config)
    said = family.write(model.config)
    said.pop(TIED)
    entries = list(_entries(model, family, None if dtype is None else WRITTEN[dtype]))
    if factors := said.pop(FACTORS, None):
        entries.append(Entry(STRETCH, Type.F32, (len(factors),), lambda: np.array(factors, "<f4")))
    kind = next(entry.type for entry in entries if len(entry.shape) > 1)
    general = {"general.file_type": FILE_TYPES[kind], "general.quantization_version": QUANTIZATION_VERSION}
    write_gguf(path, {**said, **general, **(metadata or {})}, entries)
    return family.architecture


def _entries(model: ModelModule, family: GgufFamily, type: Type | None) -> Iterator[Entry]:
    """What is to be written. A tensor is moved and packed only when its bytes are asked for."""
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    rules = list(family.rules(model.config))
    complete(rules, tensors)
    for rule in rules:
        shapes = their_shapes(rule, {name: tuple(tensors[name].shape) for name in rule.ours})
        for name, shape in zip(rule.theirs, shapes, strict=True):
            stored = type_for(name, shape, tensors[rule.ours[0]].dtype, type)
            yield Entry(name, stored, shape, partial(_content, rule, name, tensors, stored))


def _content(rule: Rule, name: str, tensors: Mapping[str, torch.Tensor], type: Type) -> np.ndarray:
    return pack(to_theirs([rule], tensors)[name], type)


def _family(file: GgufFile) -> GgufFamily:
    parts = file.metadata.get("split.count", 1)
    if parts != 1:
        raise UserError(f"is one of {parts} parts of a model; join them first (llama.cpp's llama-gguf-split --merge)")
    name = file.metadata.get(ARCHITECTURE)
    if not isinstance(name, str):
        raise UserError(f"says nothing of its architecture ({ARCHITECTURE}): not a model")
    found = {family.architecture: family for family in GGUF_FAMILIES}
    fitting = next((family for family in GGUF_FAMILIES if family.describes(file.metadata)), None)
    if fitting is not None:
        return fitting
    if name not in found:
        near = ", ".join(difflib.get_close_matches(name, found, len(found), cutoff=0.0))
        needed = "a table of its tensors in models/dialects/gguf/families.py"
        raise UserError(f"architecture {name!r} is not supported (it needs {needed}); the nearest that are: {near}")
    return found[name]


def _facts(file: GgufFile, family: GgufFamily) -> dict[str, Any]:
    """The metadata, with what only the tensors say: the vocabulary's size, `TIED` and `FACTORS`."""
    embedding, output = (file.tensors.get(name) for name in OUTSIDE)
    if embedding is None:
        raise UserError(f"has no tensor {OUTSIDE[0]!r}: it is no language model")
    said = {**file.metadata, f"{family.architecture}.vocab_size": embedding.shape[0], TIED: output is None}
    said.pop(FACTORS, None)
    if family.stretched and STRETCH in file.tensors:
        said[FACTORS] = tuple(map(float, map(str, read(file, STRETCH, torch.float32).numpy().reshape(-1))))
    return said


def _lossless(model: Model) -> GgufFamily:
    """The first family that loses nothing. Raises `UserError` with what the nearest one loses."""
    best = min(GGUF_FAMILIES, key=lambda family: distance(family, model))
    lost = losses(best, model)
    if lost:
        more = f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
        fields = "; ".join(lost[:SHOWN]) + more
        raise UserError(f"GGUF ({best.architecture}) cannot express this model: {fields}. Keep it in the native format")
    return best
