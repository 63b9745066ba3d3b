"""`headspring serve`: models behind OpenAI's API. Thin: options become a `ServerConfig`, the rest is `headspring.serving`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from headspring.artifacts.errors import UserError
from headspring.cli.generate import Device, Dtype, Quantize

VARIABLE = "HEADSPRING_API_KEY"


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("serve", epilog="Example: headspring serve runs/quickstart --port 8000")(serve)


def serve(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Runs, folders, .gguf files or hub names; NAME=MODEL names one.")
    ],
    host: Annotated[str, typer.Option(help="Any other address than this machine's own needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    key_file: Annotated[Path | None, typer.Option(help=f"Bearer keys, one a line; or the variable {VARIABLE}.")] = None,
    allow_host: Annotated[list[str] | None, typer.Option(help="A name under which clients reach this server.")] = None,
    memory: Annotated[float | None, typer.Option(help="GiB for the key-value cache of each model.")] = None,
    max_sequences: Annotated[int, typer.Option(help="Answers that run together.")] = 64,
    cache_dtype: Annotated[str, typer.Option(help="auto, or int8: half the bytes of keys and values.")] = "auto",
    speculation: Annotated[
        str | None, typer.Option(help="prompt_lookup, multi_token, draft=MODEL or early_exit=LAYERS.")
    ] = None,
    max_queue: Annotated[int, typer.Option(help="Requests that may wait; then 429.")] = 256,
    drain_seconds: Annotated[float, typer.Option(help="What runs may finish for so long after SIGTERM.")] = 30.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = "auto",
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FOLDER", help="A LoRA adapter beside its base (NAME@MODEL=FOLDER where there are several)."),
    ] = None,
) -> None:
    """Serve models behind OpenAI's API."""
    places = named(models)
    adapters = named_adapters(adapter or [], list(places))
    keys = _keys(key_file)
    from pydantic import ValidationError

    from headspring.inference import LanguageModel
    from headspring.inference.engine import EngineConfig
    from headspring.serving import ServerConfig
    from headspring.serving import serve as run

    try:
        config = ServerConfig(
            host=host,
            port=port,
            keys=keys,
            allowed_hosts=tuple(allow_host or ()),
            max_queue=max_queue,
            drain_seconds=drain_seconds,
        )
        engine = EngineConfig(
            max_sequences=max_sequences,
            memory=None if memory is None else int(memory * 2**30),
            cache_dtype=cache_dtype,
            speculation=_speculation(speculation),
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"--{str(first['loc'][0]).replace('_', '-')}: {first['msg'].lower()}" if first["loc"] else first["msg"]
        ) from None
    config.check()
    loaded = {}
    for name, place in places.items():
        _refuse_adapter(place)
        loaded[name] = LanguageModel.load(place, device=device, dtype=dtype, quantize=None if quantize == "none" else quantize)
    loaded |= {name: loaded[base].with_adapter(folder) for name, (base, folder) in adapters.items()}
    run(loaded, config, engine)


def named(models: list[str]) -> dict[str, str]:
    """ "a=RUN1", "RUN2" → {name: place}; a place without a name has that of its folder or file. Raises `UserError`."""
    found: dict[str, str] = {}
    for text in models:
        name, equals, place = text.partition("=")
        if not equals or "/" in name:
            name, place = Path(text).name.removesuffix(".gguf") or text, text
        if not name or not place:
            raise UserError(f"{text!r}: a model is NAME=MODEL or MODEL")
        if name in found:
            raise UserError(f"two models are named {name!r}; name them, as in a={found[name]} b={place}")
        found[name] = place
    return found


def named_adapters(adapters: list[str], models: list[str]) -> dict[str, tuple[str, str]]:
    """ "poet=FOLDER", "poet@a=FOLDER" → {name: (model, folder)}; without a model it is the only one. Raises `UserError`."""
    found: dict[str, tuple[str, str]] = {}
    for text in adapters:
        who, _, folder = text.partition("=")
        name, at, base = who.partition("@")
        base = base if at else models[0] if len(models) == 1 else ""
        if not name or not folder or base not in models:
            raise UserError(
                f"--adapter {text}: use NAME=FOLDER or, of several models, NAME@MODEL=FOLDER (of {', '.join(models)})"
            )
        if name in found or name in models:
            raise UserError(f"--adapter {text}: {name!r} is the name of another one; choose a name of its own")
        found[name] = base, folder
    return found


def _speculation(text: str | None) -> dict[str, str] | None:
    """ "draft=MODEL" → {kind, model}; pydantic reads the rest."""
    if text is None:
        return None
    kind, _, value = text.partition("=")
    names = {"draft": "model", "early_exit": "layers"}
    if (kind in names) != bool(value):
        raise UserError(f"--speculation {text}: use prompt_lookup, multi_token, draft=MODEL or early_exit=LAYERS")
    return {"kind": kind, names[kind]: value} if value else {"kind": kind}


def _keys(file: Path | None) -> tuple[str, ...]:
    """Keys of the file, or of the environment. A file that others may read is refused."""
    if file is None:
        return tuple(filter(None, [os.environ.get(VARIABLE, "").strip()]))
    try:
        if file.stat().st_mode & 0o077:
            raise UserError(f"{file}: others can read these keys; chmod 600 {file}")
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise UserError(f"{file}: holds no key; one a line")
    return keys


def _refuse_adapter(place: str) -> None:
    if (Path(place) / "adapter_config.json").is_file():
        raise UserError(f"{place} is a LoRA adapter: serve the model that it is for, with --adapter NAME={place}")
