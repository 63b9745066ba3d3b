"""A model read in whole numbers, whatever it is stored as: what `LanguageModel.load(quantize=…)` means.

| quantize | what |
| --- | --- |
| None | as it is stored: floats, or the whole numbers of a quantized folder; the blocks of a .gguf file become floats |
| keep | the blocks of a .gguf file stay what they are |
| auto | keep, where there are blocks and this machine multiplies them faster than bfloat16 (`choice`); else None |
| a scheme (`int8`, `int4-gptq`, …) | the floats are rounded when they have been read |
"""

from collections.abc import Callable
from pathlib import Path

import torch

from headspring.artifacts import UserError
from headspring.inference.loading import is_gguf, read_model
from headspring.inference.quantization.calibration import texts_of, token_rows
from headspring.inference.quantization.choice import check_products, fastest, matrices_of
from headspring.inference.quantization.folder import is_quantized
from headspring.inference.quantization.installing import install, plain, restore
from headspring.inference.quantization.quantize import Matrices, quantize
from headspring.inference.quantization.scheme import Quantization
from headspring.models import kernels
from headspring.models.dialects.gguf import read_gguf
from headspring.models.kernels.packed import pack_bf16
from headspring.models.model import ModelModule
from headspring.tokenization.tokenizer import Tokenizer

ACTIVATIONS = torch.bfloat16
AUTO, KEEP = "auto", "keep"


def read(
    path: Path,
    dtype: torch.dtype | None,
    how: str | Quantization | None,
    tokenizer: Callable[[], Tokenizer],
    rows: torch.Tensor | None = None,
    notes: list[str] | None = None,
) -> ModelModule:
    """The model at `path`. `dtype` is that of the weights, or None for the stored one; of whole numbers it is that of the
    activations, bfloat16 by default. `tokenizer` is asked for where text is read. `rows` (N, T) int64 are what GPTQ reads
    (None: the text that the scheme names), `notes` as for `quantize`. Raises `UserError`."""
    if how == AUTO:
        fast = dtype is None and is_gguf(path) and kernels.multiplies_natively(torch.empty(0, dtype=ACTIVATIONS))
        kept = _kept(path) if fast else None
        return _faster(*kept) if kept and kept[1] else _as_stored(path, dtype)
    if how is None:
        return _as_stored(path, dtype)
    if how == KEEP:
        model, matrices = _kept(path)
        if not matrices:
            raise UserError(f"{path}: holds no blocks to keep; leave quantize out")
        return _installed(model, matrices, dtype)
    scheme = Quantization.of(how)
    if is_quantized(path):
        raise UserError(f"{path}: is quantized already; leave quantize out")
    model = read_model(path, None)
    model.compute_dtype = dtype or ACTIVATIONS
    if rows is None and scheme.method == "int4-gptq":
        rows = calibration_rows(scheme, model, tokenizer())
    return _installed(model, quantize(model, scheme, rows, notes), dtype)


def calibration_rows(scheme: Quantization, model: ModelModule, tokenizer: Tokenizer) -> torch.Tensor:
    """What GPTQ reads (N, T)."""
    texts = texts_of(scheme.calibration, "calibration")
    return token_rows(tokenizer, texts, scheme.tokens, model.config.context)


def _as_stored(path: Path, dtype: torch.dtype | None) -> ModelModule:
    model = read_model(path, dtype)
    parameter = next(model.parameters(), None)
    if parameter is not None and not model.released:  # an n-gram model has no parameters
        model.compute_dtype = parameter.dtype
    return model


def _kept(path: Path) -> tuple[ModelModule, Matrices]:
    if not is_gguf(path):
        raise UserError(f"{path}: quantize='keep' is for the blocks of a .gguf file; leave it out, or name a scheme")
    return read_gguf(path, keep=True)


def _faster(model: ModelModule, matrices: Matrices) -> ModelModule:
    """With blocks as they are or unpacked to bfloat16, whichever takes a token through the model sooner."""
    model = _installed(model, matrices, None)
    blocks = matrices_of(model)
    # Values play no part in how long a product takes, so that zeros stand for the unpacked ones.
    unpacked = (pack_bf16(torch.zeros(block.shape)) for block in blocks)
    if fastest({"blocks": blocks, "bfloat16": unpacked}, blocks) == "bfloat16":
        restore(model, ACTIVATIONS)
    return model


def _installed(model: ModelModule, matrices: Matrices, dtype: torch.dtype | None) -> ModelModule:
    model.compute_dtype = dtype or ACTIVATIONS
    plain(model, model.compute_dtype)
    install(model, matrices)
    check_products(matrices_of(model))
    return model
