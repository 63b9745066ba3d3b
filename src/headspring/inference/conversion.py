"""One model, three ways to write it down: Hugging Face's layout, Headspring's own (whole numbers too), and GGUF.

Whatever the source is, it is loaded as it would be for generating, and written by the format's own module, so that a
conversion is no third reading of any format. A format without words for the model refuses it and names the fields.
The target appears whole or not at all.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from headspring.artifacts import HeadspringError, UserError
from headspring.artifacts.files import folder_atomic
from headspring.inference.language_model import LanguageModel
from headspring.inference.loading import ALIASES, DTYPES, is_gguf
from headspring.inference.quantization.calibration import embedded_texts, token_rows
from headspring.inference.quantization.folder import save_quantized
from headspring.inference.quantization.installing import restore
from headspring.inference.quantization.reading import read
from headspring.inference.quantization.report import Baseline, report
from headspring.inference.quantization.scheme import Quantization
from headspring.models import save_model
from headspring.models.dialects import export_huggingface, expresses
from headspring.models.dialects.gguf import WRITTEN, export_gguf
from headspring.tokenization.formats.gguf import GGML, to_metadata

Format = Literal["huggingface", "native", "gguf"]


def convert(
    source: str | Path,
    target: str | Path,
    to: str | None = None,
    dtype: str | None = None,
    force: bool = False,
    revision: str | None = None,
    quantize: str | Quantization | None = None,
    held_out: int = 0,
    adapter: str | Path | None = None,
) -> dict[str, Any]:
    """Write the model at `source`, with its tokenizer, as the folder or `.gguf` file `target`; returns what was written.

    `to` is by default what the target's name says: `gguf`, or else `huggingface`. `dtype` None keeps the precision the
    weights are stored in (float32 for quantized ones). `quantize` writes a native folder of whole numbers, and with them a
    report (`quantization.report`) over `held_out` tokens of the embedded corpus, where there are any. `adapter` is a LoRA
    folder that is merged into the weights. Raises `UserError` for a target that exists (unless `force`: then an older model
    there is replaced), and for what the format cannot say.
    """
    start, target = time.perf_counter(), Path(target).expanduser()
    if quantize is not None and to is None and not is_gguf(target):
        to = "native"
    form, precision = _format(target, to), None if dtype is None else ALIASES.get(dtype, dtype)
    if quantize is not None and (form != "native" or dtype is not None):
        raise UserError("quantize writes a native folder of whole numbers: leave --dtype out, and --to or say native")
    _check_dtype(form, precision)
    _check_target(target, source, force)
    if quantize is not None and adapter is not None:
        raise UserError("--adapter is merged into floats: write these, and quantize what was written")
    lm = LanguageModel.load(source, device="cpu", revision=revision)
    if adapter is not None:
        lm = _floats(lm).with_adapter(adapter).merged()
    if precision in ("float16", "f16"):
        _check_range(lm)
    try:
        if quantize is not None:
            said = _write_quantized(lm, target, quantize, held_out)
        elif form == "gguf":
            said = _write_gguf(_floats(lm), target, precision, str(source))
        else:
            said = _write_folder(_floats(lm), target, form, precision)
    except OSError as error:
        raise HeadspringError(f"{target}: cannot be written ({error.strerror or error})") from error
    files = [target] if target.is_file() else [file for file in target.rglob("*") if file.is_file()]
    return {
        "source": str(source),
        "target": str(target),
        "format": form,
        **said,
        "parameters": lm.model.num_parameters(),
        "bytes": sum(file.stat().st_size for file in files),
        "seconds": time.perf_counter() - start,
    }


def _floats(lm: LanguageModel) -> LanguageModel:
    """The model with what its whole numbers mean, in float32, where it has whole numbers."""
    if lm.model.released:
        restore(lm.model)
    return lm


def _write_quantized(lm: LanguageModel, target: Path, how: str | Quantization, held_out: int) -> dict[str, Any]:
    if lm.folder is None or lm.model.released:
        raise UserError("this model is quantized already; convert the floats it was made from")
    notes: list[str] = []
    quantized = read(lm.folder, None, how, lambda: lm.tokenizer, notes=notes)
    scheme = how if isinstance(how, str) else how.name
    about: dict[str, Any] = {"scheme": scheme, **({"notes": notes} if notes else {})}
    if held_out:
        rows = token_rows(lm.tokenizer, embedded_texts("held_out"), held_out, lm.context)
        baseline = Baseline(lm.model, lm.tokenizer, rows, quantized.compute_dtype)
        about |= report(baseline, quantized, scheme).as_dict()
    with folder_atomic(target) as folder:
        save_quantized(quantized, folder, about)
        lm.tokenizer.save(folder)
    architecture = type(lm.config).__name__
    return {"architecture": architecture, "dtype": scheme, "tokenizer": "tokenizer.json", "quantization": about}


def _write_gguf(lm: LanguageModel, target: Path, dtype: str | None, name: str) -> dict[str, Any]:
    tokenizer = to_metadata(lm.tokenizer, lm.vocab_size)
    general = {"general.type": "model", "general.name": Path(name).name}
    architecture = export_gguf(lm.model, target, dtype, {**general, **tokenizer})
    return {"architecture": architecture, "dtype": dtype or _stored(lm), "tokenizer": tokenizer[f"{GGML}model"]}


def _write_folder(lm: LanguageModel, target: Path, form: Format, dtype: str | None) -> dict[str, Any]:
    if dtype is not None:
        lm.model.to(DTYPES[dtype])
    with folder_atomic(target) as folder:
        if form == "huggingface":
            export_huggingface(lm.model, folder, tokens=lm.special_tokens())
            architecture = expresses(lm.model.config)
        else:
            save_model(lm.model, folder)
            architecture = type(lm.config).__name__
        lm.tokenizer.save(folder, prompt_start=form == "huggingface" and lm.model.config.causal)
    return {"architecture": architecture, "dtype": _stored(lm), "tokenizer": "tokenizer.json"}


def _stored(lm: LanguageModel) -> str:
    return str(next(lm.model.parameters()).dtype).removeprefix("torch.")


def _format(target: Path, to: str | None) -> Format:
    formats: Mapping[str, Format] = {name: name for name in get_args(Format)}
    form = formats.get(to or ("gguf" if is_gguf(target) else "huggingface"))
    if form is None:
        raise UserError(f"{to!r} is no format; use {', '.join(formats)}")
    if is_gguf(target) != (form == "gguf"):
        raise UserError(f"{target}: GGUF is a file whose name ends with .gguf, and {form} would be read by its name")
    return form


def _check_dtype(form: Format, dtype: str | None) -> None:
    known = tuple(WRITTEN) if form == "gguf" else tuple(DTYPES)
    if dtype is not None and dtype not in known:
        raise UserError(f"dtype {dtype!r} cannot be written as {form}; use {', '.join(known)}")


def _check_target(target: Path, source: str | Path, force: bool) -> None:
    """Nothing is overwritten by accident: not the source, not without `force`, and never a folder that is no model."""
    if not target.exists():
        return
    here = Path(source).expanduser()
    if here.exists() and (target.samefile(here) or target.resolve() in here.resolve().parents):
        raise UserError(f"{target}: is or holds what shall be converted; choose another target")
    if not force:
        raise UserError(f"{target}: exists already; use --force to replace it, or choose another target")
    if target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file():
        raise UserError(f"{target}: is a folder that holds no model, which --force does not replace; choose another target")
    if target.is_dir() == is_gguf(target):
        raise UserError(f"{target}: is no {'file' if is_gguf(target) else 'folder'}; choose another target")


def _check_range(lm: LanguageModel) -> None:
    largest = torch.finfo(torch.float16).max
    for name, tensor in lm.model.state_dict().items():
        if tensor.abs().max() > largest:
            raise UserError(f"{name} holds values beyond float16's largest of {largest:.0f}; use bfloat16 or float32")
