"""`headspring convert`: a model in another format."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from headspring.artifacts.errors import UserError

TOKENIZER_NOTE = "note: GGUF has no name for this tokenizer; it is inside as tokenizer.json, which llama.cpp does not read"


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("convert", epilog="Example: headspring convert runs/quickstart model.gguf --dtype q8_0")(convert)


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A run, a folder, a .gguf file or a hub name.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A .gguf file to write, or a folder.")],
    to: Annotated[
        str | None, typer.Option(help="huggingface, native or gguf; by default what DST's name says, or huggingface.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16; GGUF also q8_0, q5_1, q5_0, q4_1, q4_0. Default: as stored.")
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(help="int8, int4, int4-gptq, int4-gptq-64 and so on, or keep (a .gguf file's blocks): a folder of these."),
    ] = None,
    calibration: Annotated[Path | None, typer.Option(help="Text that int4-gptq reads. Default: the embedded corpus.")] = None,
    held_out: Annotated[int, typer.Option(help="With --quantize: tokens that both models are compared on; 0: none.")] = 4096,
    adapter: Annotated[Path | None, typer.Option(help="Folder of a LoRA adapter, merged into the weights.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a model that is already there.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub name.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Write a model, with its tokenizer, in another format: Hugging Face folder, native folder, GGUF file; or quantize it."""
    from headspring.inference.conversion import convert as convert_model
    from headspring.inference.quantization.report import as_text

    how = _scheme(quantize, calibration)
    options = {} if how is None else {"quantize": how, "held_out": held_out}
    done = convert_model(source, target, to=to, dtype=dtype, force=force, revision=revision, adapter=adapter, **options)
    if as_json:
        typer.echo(json.dumps(done, indent=2))
    else:
        size = f"{done['parameters']:,} parameters in {done['dtype']}, {done['bytes'] / 1e6:,.1f} MB"
        typer.echo(f"{done['target']}: {done['format']} ({done['architecture']}), {size}, {done['seconds']:.1f} s")
        for line in as_text(done.get("quantization", {})):
            typer.echo(line)
    if done["tokenizer"] == "none":
        print(TOKENIZER_NOTE, file=sys.stderr)


def _scheme(name: str | None, calibration: Path | None) -> Any:
    """What to hand on; the text belongs to GPTQ alone."""
    from headspring.inference.quantization.scheme import Quantization

    if calibration is not None and "gptq" not in (name or ""):
        raise UserError("--calibration is the text that int4-gptq reads: say --quantize int4-gptq, or leave it out")
    if name in (None, "keep"):
        return name
    return Quantization.of(name).model_copy(update={"calibration": None if calibration is None else str(calibration)})
