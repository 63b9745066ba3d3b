"""The tokenizer inside a GGUF file: read into the library's terms, and written from them.

`tokenizer.ggml.model` names the algorithm. `gpt2` is byte-level BPE: tokens, merges, and the *name* of the expression that
cuts text before any merge; what a name means is the table `PRE` (from llama.cpp's llama-vocab.cpp). `llama` is
SentencePiece's BPE: tokens with scores. What a token is (a control token, a byte, never used) stands in `token_type`.

A pipeline that those words cannot say, such as Headspring's own cuts, WordPiece or Unigram, is written whole as
`tokenizer.huggingface.json`, a key of the same specification, and the model as `none`: a program that does not know the
key then says so, where a name that is nearly right would give other tokens in silence.
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as LibraryTokenizer

from headspring.artifacts import CorruptArtifact, UserError
from headspring.artifacts.gguf import GgufFile
from headspring.tokenization.formats.sentencepiece import bpe_model, set_pipeline
from headspring.tokenization.pieces import META, flatten
from headspring.tokenization.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama_token_type
GGML, WHOLE, TEMPLATE = "tokenizer.ggml.", "tokenizer.huggingface.json", "tokenizer.chat_template"
ROLES = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id"}
END = "eot_token_id"  # what ends a turn; our reader finds it in the chat template

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """Patterns, each of which cuts what the ones before it left; `ignore_merges`: a piece that is a token is not merged;
    `nfc`: the family's own tokenizer normalises text to that form; `add_bos` where the file does not say."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    nfc: bool = False
    add_bos: bool = False


PRE = {
    "gpt-2": PreTokenizer((GPT2,)),
    "llama-bpe": PreTokenizer((GPT4.replace("DIGITS", r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True),
    "qwen2": PreTokenizer((GPT4.replace("DIGITS", r"\p{N}"),), nfc=True),
    "smollm": PreTokenizer((r"\p{N}", GPT2)),
    # The same as the last two by other names, and llama.cpp's own guess for files that give none.
    "stablelm2": PreTokenizer((GPT4.replace("DIGITS", r"\p{N}"),)),
    "dbrx": PreTokenizer((GPT4.replace("DIGITS", r"\p{N}{1,3}"),)),
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
}
ALIASES = {
    **dict.fromkeys(("phi-2", "olmo", "mpt", "gpt2"), "gpt-2"),
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "pixtral"), "llama-bpe"),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), "smollm"),
    **dict.fromkeys(("hunyuan", "megrez", "deepseek-r1-qwen"), "stablelm2"),
    "smaug-bpe": "dbrx",
}


def load_gguf(file: Path) -> Tokenizer:
    """The tokenizer of a GGUF file. Raises `UserError` where there is none, or one of another kind."""
    return from_metadata(GgufFile(file).metadata, str(file))


def from_metadata(metadata: dict[str, Any], where: str) -> Tokenizer:
    """The tokenizer that a file's metadata describes; `where` begins its errors."""
    said = _Said(metadata, where)
    model = said.get(f"{GGML}model", str)
    add_bos = said.get(f"{GGML}add_bos_token", bool)
    if said.get(WHOLE, str) is not None:
        library, default = LibraryTokenizer.from_str(metadata[WHOLE]), True
    elif model == "gpt2":
        pre = _pre_tokenizer(said)
        library, default = _byte_level(said, pre), pre.add_bos
    elif model == "llama":
        library, default = _sentencepiece(said), True
    elif model in (None, "none"):
        raise UserError(f"{where}: holds no tokenizer ({GGML}model and {WHOLE} are absent)")
    else:
        raise UserError(f"{where}: a tokenizer of kind {model!r} is not supported; gpt2 and llama are")
    names = {f"{role}_token": said.token(f"{GGML}{key}", library) for role, key in ROLES.items()}
    template = said.get(TEMPLATE, str)
    return Tokenizer(library, chat_template=template, add_bos=default if add_bos is None else add_bos, **names)


@dataclass(frozen=True)
class _Said:
    """Metadata whose types are checked when it is read."""

    metadata: dict[str, Any]
    where: str

    def get(self, key: str, type: type) -> Any:
        """The value, or None where the file does not say."""
        value = self.metadata.get(key)
        if value is None or isinstance(value, type):
            return value
        raise self.damaged(f"{key} is no {type.__name__}")

    def damaged(self, what: str) -> UserError:
        return CorruptArtifact(f"{self.where}: {what}; the file is damaged, get it again")

    def tokens(self) -> list[str]:
        tokens = self.get(f"{GGML}tokens", list)
        if not tokens or len(set(tokens)) != len(tokens):
            what = "a token twice" if tokens else "no tokens"
            raise self.damaged(f"{GGML}tokens holds {what}")
        return tokens

    def numbers(self, key: str, count: int) -> list[Any]:
        """One number a token."""
        values = self.get(f"{GGML}{key}", np.ndarray)
        if values is None or len(values) != count:
            found = "no" if values is None else len(values)
            raise self.damaged(f"{GGML}{key} has {found} values for {count} tokens")
        return values.tolist()

    def token(self, key: str, library: LibraryTokenizer) -> str | None:
        number = self.get(key, int)
        token = None if number is None or number >= 1 << 32 else library.id_to_token(number)
        if number is not None and token is None:
            raise self.damaged(f"{key} is {number}, which is no token")
        return token


# ---- reading


def _pre_tokenizer(said: _Said) -> PreTokenizer:
    name = said.get(f"{GGML}pre", str) or "default"
    name = ALIASES.get(name, name)
    if name not in PRE:
        raise UserError(f"{said.where}: {GGML}pre {name!r} is not supported; {', '.join(sorted({*PRE, *ALIASES}))} are")
    return PRE[name]


def _byte_level(said: _Said, pre: PreTokenizer) -> LibraryTokenizer:
    tokens = said.tokens()
    types = said.numbers("token_type", len(tokens))
    merges = [tuple(merge.split(" ")) for merge in said.get(f"{GGML}merges", list) or [] if isinstance(merge, str)]
    if any(len(pair) != 2 for pair in merges):
        raise said.damaged(f"{GGML}merges are not pairs of tokens")
    vocab = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}
    library = LibraryTokenizer(models.BPE(vocab, merges, ignore_merges=pre.ignore_merges))  # type: ignore[arg-type]
    cuts: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    library.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    if pre.nfc:
        library.normalizer = normalizers.NFC()
    library.decoder = decoders.ByteLevel()
    return _with_added(library, tokens, types)


def _sentencepiece(said: _Said) -> LibraryTokenizer:
    tokens = said.tokens()
    scores, types = said.numbers("scores", len(tokens)), said.numbers("token_type", len(tokens))
    used = 1 + max((i for i, type in enumerate(types) if type != UNUSED), default=-1)
    tokens, scores, types = tokens[:used], scores[:used], types[:used]
    unknown = types.index(UNKNOWN) if UNKNOWN in types else None
    library = LibraryTokenizer(bpe_model(list(zip(tokens, scores)), unknown, BYTE in types))
    prefix, squeeze = (said.get(f"{GGML}{key}", bool) for key in ("add_space_prefix", "remove_extra_whitespaces"))
    spec = {"precompiled_charsmap": b"", "remove_extra_whitespaces": bool(squeeze), "add_dummy_prefix": prefix is not False}
    set_pipeline(library, SimpleNamespace(**spec))
    return _with_added(library, tokens, [CONTROL if type == UNUSED else type for type in types])


def _with_added(library: LibraryTokenizer, tokens: list[str], types: list[int]) -> LibraryTokenizer:
    """Control tokens, which no text can spell, and user-defined ones, which are found in a text before anything else."""
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        chosen = [AddedToken(token, special=special, normalized=False) for token, type in zip(tokens, types) if type == kind]
        (library.add_special_tokens if special else library.add_tokens)(chosen)
    return library


# ---- writing


def to_metadata(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """What a GGUF file says of a tokenizer whose model has `vocab_size` ≥ its own rows. Reads back as the same tokenizer."""
    said = _said_byte_level(tokenizer, vocab_size) or _said_sentencepiece(tokenizer, vocab_size)
    if said is None or not _same(tokenizer, from_metadata(said, "what was written")):
        said = {f"{GGML}model": "none"} | (said or {}) | {WHOLE: tokenizer.library.to_str()}
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id, "end": tokenizer.end_id}
    said |= {f"{GGML}{key}": ids[role] for role, key in {**ROLES, "end": END}.items() if ids[role] is not None}
    said[f"{GGML}add_bos_token"] = tokenizer.add_bos and tokenizer.bos_id is not None
    return said | ({} if tokenizer.template is None else {TEMPLATE: tokenizer.template})


def _said_byte_level(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any] | None:
    """The words of kind `gpt2`, or None where there are none for this tokenizer."""
    description, model = tokenizer.description, tokenizer.description["model"]
    pre = PreTokenizer(
        _patterns(description.get("pre_tokenizer")),
        bool(model.get("ignore_merges")),
        (description.get("normalizer") or {}).get("type") == "NFC",
    )
    names = [name for name, known in PRE.items() if _cuts(known) == _cuts(pre)]
    if tokenizer.kind != "BPE" or tokenizer.scheme.family != "byte-level" or not names:
        return None
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    said = {f"{GGML}model": "gpt2", f"{GGML}pre": names[0], **_tokens(tokenizer, vocab_size)}
    return said | {f"{GGML}merges": merges}


def _said_sentencepiece(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any] | None:
    """The words of kind `llama`, or None. Only the order of scores counts, so that a merge's rank will do for one."""
    description, model = tokenizer.description, tokenizer.description["model"]
    steps = flatten(description.get("normalizer"), "normalizers")
    prefix = [step["type"] for step in steps] == ["Prepend", "Replace"]
    replaces = bool(steps) and steps[-1].get("content") == META and steps[-1].get("pattern") == {"String": " "}
    if tokenizer.kind != "BPE" or description.get("pre_tokenizer") or not replaces or len(steps) != 1 + prefix:
        return None
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    said = {f"{GGML}model": "llama", f"{GGML}pre": "default", **_tokens(tokenizer, vocab_size)}
    scores = [-float(ranks.get(token, len(ranks))) for token in said[f"{GGML}tokens"]]
    return said | {f"{GGML}scores": np.array(scores, "<f4"), f"{GGML}add_space_prefix": prefix}


def _tokens(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Every row of the model's embedding needs a token; one that nothing spells gets a name and the type UNUSED."""
    added = {token["id"]: token for token in tokenizer.description.get("added_tokens", [])}
    tokens, types = [], []
    for i in range(vocab_size):
        token = tokenizer.token(i) if i < tokenizer.vocab_size else ""
        tokens.append(token or f"[UNUSED{i}]")
        types.append(_type(tokenizer, i, token, added.get(i)))
    return {f"{GGML}tokens": tokens, f"{GGML}token_type": np.array(types, "<i4")}


def _type(tokenizer: Tokenizer, id: int, token: str, added: dict[str, Any] | None) -> int:
    if not token:
        return UNUSED
    if id == tokenizer.unk_id:
        return UNKNOWN
    if added is not None:
        return CONTROL if added["special"] else USER_DEFINED
    byte = tokenizer.scheme.family == "sentencepiece" and tokenizer.description["model"].get("byte_fallback")
    return BYTE if byte and tokenizer.is_byte_piece(id) else NORMAL


def _patterns(part: dict[str, Any] | None) -> tuple[str, ...]:
    """The patterns a parsed `pre_tokenizer` cuts by; one that is more than cutting gives a pattern nobody knows."""
    found = []
    for step in flatten(part, "pretokenizers"):
        how = (step.get("behavior"), step.get("invert"))
        if step["type"] == "Split" and "Regex" in step["pattern"] and how in (("Isolated", False), ("Removed", True)):
            found.append(step["pattern"]["Regex"])
        elif step["type"] == "Digits" and step["individual_digits"]:
            found.append(r"\p{N}")
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            found += [GPT2] if step["use_regex"] else []
        else:
            return ("?",)
    return tuple(found)


def _cuts(pre: PreTokenizer) -> tuple[Any, ...]:
    return pre.patterns, pre.ignore_merges, pre.nfc


def _same(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers give every text the same ids: pipelines of the same kind, and equal in all that varies."""
    return _varies(one) == _varies(other)


def _varies(tokenizer: Tokenizer) -> tuple[Any, ...]:
    description, model = tokenizer.description, tokenizer.description["model"]
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model.get("merges", ())]
    ignored = {"normalized"} if description.get("normalizer") is None else set()
    added = [{key: token[key] for key in token.keys() - ignored} for token in description.get("added_tokens", [])]
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    rest = {key: model.get(key) or None for key in options}
    vocab = tokenizer.library.get_vocab(with_added_tokens=True)
    return vocab, merges, rest, sorted(added, key=lambda token: token["id"]), _patterns(description.get("pre_tokenizer"))
