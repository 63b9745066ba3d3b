"""Train a tokenizer: byte-level BPE, WordPiece or Unigram.

The library trains (in Rust, on counts of the distinct pieces a text splits into, so memory follows the number of
distinct words and not the corpus). The short versions in `reference/` show the algorithms, and the tests hold them
against it. Control tokens get the last ids and are never part of the model, so that no string can spell one.

Byte-level BPE starts from all 256 bytes and normalises nothing: every string comes back exactly.
Unigram writes spaces as `▁` (SentencePiece's way) and falls back to bytes: exact, but for a literal `▁`, which it
reads as a space.
WordPiece drops white space and knows an unknown token: it reads, but does not write back.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, Literal

from pydantic import Field, model_validator
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as LibraryTokenizer

from headspring.artifacts import UserError, Value
from headspring.text.chat import CONTROL_TOKENS, MASK, SENTINEL
from headspring.tokenization.pieces import META
from headspring.tokenization.splitting import DIGITS, DigitPolicy, chunks, split_pattern
from headspring.tokenization.tokenizer import Tokenizer

BYTES = 256
UNKNOWN = {"wordpiece": "[UNK]", "unigram": "<unk>"}
# What a literal `<0x41>` is spelled with: these must be pieces of their own, or byte fallback would read it as a byte.
_BYTE_PIECE_ALPHABET = list("<0x123456789ABCDEF>")


class TokenizerConfig(Value):
    """What to train. `vocab_size` counts everything: control tokens, the 256 bytes, the unknown token.

    `mask` adds the control token that stands for a hidden token, which training an encoder needs; `sentinels` are as many
    that stand for a span each, which span corruption needs (T5 has 100).
    """

    kind: Literal["bpe", "wordpiece", "unigram"] = "bpe"
    vocab_size: int = Field(default=4096, gt=0)
    min_frequency: int = Field(default=2, ge=1)
    digits: DigitPolicy = "pairs"
    byte_fallback: bool | None = None  # unigram only; None means yes there
    mask: bool = False
    sentinels: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _byte_fallback_is_for_unigram(self) -> "TokenizerConfig":
        if self.byte_fallback is not None and self.kind != "unigram":
            raise ValueError(f"byte_fallback belongs to kind unigram, not {self.kind}; leave it out")
        if self.min_frequency != 2 and self.kind == "unigram":
            raise ValueError("min_frequency belongs to bpe and wordpiece: unigram prunes by likelihood; leave it out")
        return self

    @property
    def control(self) -> tuple[str, ...]:
        mask = (MASK,) if self.mask else ()
        return (*CONTROL_TOKENS, *mask, *(SENTINEL.format(number) for number in range(self.sentinels)))

    @property
    def falls_back_to_bytes(self) -> bool:
        return self.kind == "unigram" and self.byte_fallback is not False


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Train on an iterator of texts, read once. Raises `UserError` for an empty corpus or an impossible size."""
    smallest = _smallest(config)
    if config.vocab_size < smallest:
        raise UserError(f"vocab_size={config.vocab_size} is too small for {config.kind}: use at least {smallest}")
    filled = (text for text in texts if text)
    first = next(filled, None)
    if first is None:
        raise UserError("the corpus for the tokenizer is empty: give it documents with text")
    counter = _Counter()
    train = {"bpe": _train_bpe, "wordpiece": _train_wordpiece, "unigram": _train_unigram}[config.kind]
    size = config.vocab_size - len(config.control)
    library = train(counter.count(chain([first], filled)), config, size)
    _check_size(library.get_vocab_size(), size, config, counter)
    library.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in config.control])
    return Tokenizer(library)


def _smallest(config: TokenizerConfig) -> int:
    """Control tokens, the unknown token, the bytes where they are part of the vocabulary, and something learned."""
    if config.kind == "bpe":
        return len(config.control) + BYTES
    return len(config.control) + 1 + (BYTES + len(_BYTE_PIECE_ALPHABET) if config.falls_back_to_bytes else 1)


def _train_bpe(texts: Iterator[str], config: TokenizerConfig, size: int) -> LibraryTokenizer:
    library = LibraryTokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([_split(config), byte_level])
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, min_frequency=config.min_frequency, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(texts, trainer)
    return library


def _train_wordpiece(texts: Iterator[str], config: TokenizerConfig, size: int) -> LibraryTokenizer:
    unknown = UNKNOWN["wordpiece"]
    library = LibraryTokenizer(models.WordPiece(unk_token=unknown))
    digits = pre_tokenizers.Split(Regex(DIGITS[config.digits]), "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), digits])
    library.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, min_frequency=config.min_frequency, special_tokens=[unknown], show_progress=False
    )
    library.train_from_iterator(texts, trainer)
    return _without_added(library)


def _train_unigram(texts: Iterator[str], config: TokenizerConfig, size: int) -> LibraryTokenizer:
    unknown = UNKNOWN["unigram"]
    library = LibraryTokenizer(models.Unigram())
    metaspace = pre_tokenizers.Metaspace(replacement=META, prepend_scheme="never", split=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([_split(config), metaspace])
    library.decoder = decoders.Sequence([decoders.Replace(META, " "), decoders.ByteFallback(), decoders.Fuse()])
    fallback = config.falls_back_to_bytes
    trainer = trainers.UnigramTrainer(
        vocab_size=size - BYTES * fallback,
        special_tokens=[unknown],
        unk_token=unknown,
        initial_alphabet=_BYTE_PIECE_ALPHABET if fallback else [],
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    return _with_byte_pieces(library) if fallback else _without_added(library)


def _split(config: TokenizerConfig) -> pre_tokenizers.Split:
    return pre_tokenizers.Split(Regex(split_pattern(config.digits)), "isolated")


def _with_byte_pieces(library: LibraryTokenizer) -> LibraryTokenizer:
    """Append `<0x00>` … `<0xFF>` to a Unigram vocabulary, scored below any spelling by characters (see `typed`)."""
    description = json.loads(library.to_str())
    model = description["model"]
    lowest = 8 * min(score for _, score in model["vocab"]) - 8
    model["vocab"] += [[f"<0x{byte:02X}>", lowest] for byte in range(BYTES)]
    model["byte_fallback"] = True
    return _without_added(description)


def _without_added(library: LibraryTokenizer | dict[str, Any]) -> LibraryTokenizer:
    """The unknown token is a part of the model; it need not be cut out of texts as well."""
    description = library if isinstance(library, dict) else json.loads(library.to_str())
    return LibraryTokenizer.from_str(json.dumps({**description, "added_tokens": []}))


class _Counter:
    """Passes texts on in bounded parts, and counts their characters."""

    def __init__(self) -> None:
        self.characters = 0

    def count(self, texts: Iterable[str]) -> Iterator[str]:
        for text in texts:
            self.characters += len(text)
            yield from chunks(text)


def _check_size(found: int, wanted: int, config: TokenizerConfig, counter: _Counter) -> None:
    if found > wanted:
        least = found + len(config.control)
        needs = f"{config.kind} needs at least {least}"
        raise UserError(f"vocab_size={config.vocab_size} does not hold this corpus's characters: {needs}")
    if found < wanted:
        largest = found + len(config.control)
        possible = f"{found - BYTES} merges were" if config.kind == "bpe" else f"{found} pieces were"
        raise UserError(
            f"vocab_size={config.vocab_size} is larger than this corpus of {counter.characters} characters supports: "
            f"{possible} possible; use vocab_size={largest} or less, or more text"
        )
