"""Texts to vectors: the whole text between what its tokenizer frames it with, through the model, pooled.

How a model's vectors are pooled belongs to the model. Where a folder says it in the layout of sentence-transformers
(`modules.json`, `1_Pooling/config.json`, `sentence_bert_config.json`), that is read, and what is trained here is written the
same way, so that either program loads the other's models.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headspring.artifacts.errors import CorruptArtifact, UserError
from headspring.artifacts.files import read_json, write_json
from headspring.data.batch import pad_left
from headspring.models.model import ModelModule
from headspring.models.pooling import Mode, Pooling, pool
from headspring.tokenization.framing import framed
from headspring.tokenization.tokenizer import Tokenizer

MODULES, LIMITS, POOLING = "modules.json", "sentence_bert_config.json", "1_Pooling/config.json"
KEYS: dict[str, Mode] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_max_tokens": "max",
}
NAMES: dict[str, Mode] = {"mean": "mean", "cls": "first", "lasttoken": "last", "max": "max"}  # newer files


@torch.inference_mode()
def embed(model: ModelModule, tokenizer: Tokenizer, texts: Sequence[str], pooling: Pooling, batch_size: int) -> torch.Tensor:
    """(n, D) float32 on the CPU. Texts of similar length run together; the order is that of `texts`."""
    limit = min(model.config.context, pooling.max_tokens or model.config.context)
    rows = framed(tokenizer, texts, limit)
    vectors = torch.empty(len(rows), model.config.width)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        tokens, padding = pad_left([np.array(rows[i]) for i in chosen], tokenizer.pad_id or 0)
        padding = None if padding is None else padding.to(model.device)
        hidden = model(tokens.to(model.device), padding=padding)
        vectors[chosen] = pool(model, hidden, padding, pooling).cpu()
    return vectors


# ---- the layout of sentence-transformers


def read_pooling(folder: Path) -> Pooling | None:
    """How the model in `folder` is pooled; None where its folder says nothing. Raises `UserError` for what is not supported."""
    modules = _read(folder / MODULES)
    if modules is None:
        return None
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    unknown = set(kinds) - {"Transformer", "Pooling", "Normalize"}
    if unknown or "Pooling" not in kinds:
        raise UserError(f"{folder / MODULES}: {', '.join(sorted(unknown)) or 'no Pooling'}: such embeddings are not supported")
    place = Path(str(modules[kinds.index("Pooling")].get("path", "")))
    if place.is_absolute() or ".." in place.parts:
        raise CorruptArtifact(f"{folder / MODULES}: {str(place)!r} is no folder in this one")
    said = _read(folder / place / "config.json") or {}
    limit = (_read(folder / LIMITS) or {}).get("max_seq_length")
    return Pooling(mode=_mode(said, folder / place), normalize="Normalize" in kinds, max_tokens=limit)


def _mode(said: Mapping[str, Any], place: Path) -> Mode:
    """One mode; several at once (their vectors joined) are not supported."""
    named = said.get("pooling_mode")
    flags = [key for key, value in said.items() if key.startswith("pooling_mode_") and value is True]
    on = [named] if isinstance(named, str) else flags
    known: Mapping[str, Mode] = KEYS | NAMES
    if len(on) != 1 or on[0] not in known:
        raise UserError(f"{place}: pooling by {' and '.join(on) or 'nothing'} is not supported; {', '.join(NAMES)} are")
    return known[on[0]]


def write_pooling(folder: Path, pooling: Pooling, width: int) -> None:
    """Write the files that `read_pooling` reads. `pooler` has no words there: that is BERT's own layer."""
    if pooling.mode == "pooler":
        raise UserError("pooling by 'pooler' cannot be written for sentence-transformers; use 'first' or 'mean'")
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if pooling.normalize else [])]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    modes = {key: mode == pooling.mode for key, mode in KEYS.items()}
    write_json(folder / MODULES, modules)
    write_json(folder / POOLING, {"word_embedding_dimension": width, **modes})
    write_json(folder / LIMITS, {"max_seq_length": pooling.max_tokens, "do_lower_case": False})


def _read(path: Path) -> Any:
    """The JSON of a file; None where there is none."""
    try:
        return read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CorruptArtifact(f"{path}: cannot be read ({error})") from error
