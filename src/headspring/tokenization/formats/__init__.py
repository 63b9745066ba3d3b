"""Every file a tokenizer comes in, and how a path finds it.

tokenizer.json            the library's own format (any model)
*.model                   SentencePiece (unigram or BPE)
vocab.txt                 BERT's WordPiece, one piece a line
merges.txt + vocab.json   GPT-2's byte-level BPE
*.gguf                    the tokenizer inside a model of llama.cpp
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as LibraryTokenizer

from headspring.artifacts import UserError
from headspring.tokenization.prompt_start import without_start
from headspring.tokenization.tokenizer import Tokenizer

KNOWN = "tokenizer.json, *.model, vocab.txt, merges.txt or *.gguf"


def load(path: Path) -> Tokenizer:
    """The tokenizer at `path`: a file, a folder that holds one, or a run. Raises `UserError` for anything else."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; a tokenizer is {KNOWN}, or a folder or run that holds one")
    file = _find(path) if path.is_dir() else path
    try:
        return _load_file(file)
    except UserError:
        raise
    except BaseException as error:  # the library raises bare Exception for parse errors, and some of its parsers panic
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{file}: not a tokenizer that can be read ({str(error).splitlines()[0][:120]})") from error


def _load_file(file: Path) -> Tokenizer:
    if file.suffix == ".json" and file.name != "vocab.json":
        return _load_json(file)
    if file.suffix == ".model":
        from headspring.tokenization.formats.sentencepiece import load_sentencepiece

        return load_sentencepiece(file)
    if file.suffix == ".gguf":
        from headspring.tokenization.formats.gguf import load_gguf

        return load_gguf(file)
    from headspring.tokenization.formats import vocabularies

    if file.name == "vocab.json" or file.name.endswith("merges.txt"):
        return vocabularies.load_merges(file)
    if file.suffix == ".txt":
        return vocabularies.load_vocab(file)
    raise UserError(f"{file}: unknown kind of tokenizer; expected {KNOWN}")


def _find(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer.model", "spiece.model", "merges.txt", "vocab.txt"):
        if (folder / name).is_file():
            return folder / name
    models = sorted(folder.glob("*.model"))
    if models:
        return models[0]
    for manifest in sorted(folder.glob("*/manifest.json")):  # a run: the stage of kind tokenizer
        if _is_tokenizer_stage(manifest):
            return manifest.parent / "tokenizer.json"
    raise UserError(f"{folder}: holds no tokenizer ({KNOWN}) and is not a run with a finished tokenizer stage")


def _is_tokenizer_stage(manifest: Path) -> bool:
    try:
        return json.loads(manifest.read_text(encoding="utf-8")).get("kind") == "tokenizer"
    except (OSError, ValueError, AttributeError):
        return False


def _load_json(file: Path) -> Tokenizer:
    library = without_start(LibraryTokenizer.from_file(str(file)))
    names = _read_config(file.parent / "tokenizer_config.json")
    template = names.get("chat_template")
    if isinstance(template, list):  # several named templates: the default one
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    separate = file.parent / "chat_template.jinja"
    if separate.is_file():
        template = separate.read_text(encoding="utf-8")
    tokens = {f"{role}_token": _name(names.get(f"{role}_token")) for role in ("bos", "eos", "pad", "mask")}
    add_bos = names.get("add_bos_token") is not False
    return Tokenizer(library, chat_template=template, add_bos=add_bos, **tokens)


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    value = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected a JSON object")
    return value


def _name(token: Any) -> str | None:
    """A token's name, which older files wrap in an object."""
    return token.get("content") if isinstance(token, dict) else token
