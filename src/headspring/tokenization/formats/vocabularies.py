"""The two plain formats of 2018: BERT's `vocab.txt` and GPT-2's `merges.txt` with `vocab.json`."""

import json
from pathlib import Path

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as LibraryTokenizer

from headspring.artifacts import UserError
from headspring.tokenization.pieces import byte_of_character
from headspring.tokenization.tokenizer import Tokenizer

BERT_CONTROL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
BERT_UNKNOWN = "[UNK]"
GPT2_CONTROL = "<|endoftext|>"


def load_vocab(file: Path) -> Tokenizer:
    """BERT's WordPiece: one piece a line, its id the line's number.

    Whether text is lowercased stands in `tokenizer_config.json` (`do_lower_case`) where there is one; otherwise it is
    read off the vocabulary: one without a capital letter is an uncased one.
    """
    tokens = file.read_text(encoding="utf-8").splitlines()
    vocab = {token: i for i, token in enumerate(tokens)}
    if BERT_UNKNOWN not in vocab or len(vocab) != len(tokens):
        what = f"no {BERT_UNKNOWN}" if BERT_UNKNOWN not in vocab else "a piece twice"
        raise UserError(f"{file}: not a WordPiece vocabulary ({what}); expected BERT's vocab.txt, one piece a line")
    library = LibraryTokenizer(models.WordPiece(vocab, unk_token=BERT_UNKNOWN, max_input_chars_per_word=100))
    library.normalizer = normalizers.BertNormalizer(lowercase=_lowercase(file, tokens))
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece(cleanup=False)
    control = [token for token in BERT_CONTROL if token in vocab]
    library.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return Tokenizer(library, pad_token="[PAD]")


def load_merges(file: Path) -> Tokenizer:
    """GPT-2's byte-level BPE. Without a `vocab.json` beside it, ids are GPT-2's: 256 bytes, then the merges."""
    merges_file = file if file.suffix == ".txt" else file.with_name("merges.txt")
    vocab_file = merges_file.with_name(merges_file.name.replace("merges.txt", "vocab.json"))
    if not merges_file.is_file():
        raise UserError(f"{merges_file}: missing; a vocab.json needs its merges.txt")
    lines = merges_file.read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    alphabet = byte_of_character()
    if any(len(pair) != 2 for pair in merges) or any(c not in alphabet for pair in merges for c in "".join(pair)):
        raise UserError(f"{merges_file}: not byte-level merges (two pieces of GPT-2's byte characters a line)")
    if vocab_file.is_file():
        vocab = json.loads(vocab_file.read_text(encoding="utf-8"))
    else:
        vocab = {piece: i for i, piece in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    library = LibraryTokenizer(models.BPE(vocab, merges))  # type: ignore[arg-type]
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    library.decoder = decoders.ByteLevel()
    name = GPT2_CONTROL if GPT2_CONTROL in vocab else None
    if name:
        library.add_special_tokens([AddedToken(name, special=True, normalized=False)])
    return Tokenizer(library, bos_token=name, eos_token=name)


def _lowercase(file: Path, tokens: list[str]) -> bool:
    config = file.with_name("tokenizer_config.json")
    if config.is_file():
        stated = json.loads(config.read_text(encoding="utf-8")).get("do_lower_case")
        if stated is not None:
            return bool(stated)
    special = {*BERT_CONTROL, BERT_UNKNOWN}
    words = (token for token in tokens if token not in special and not token.startswith("[unused"))
    return all(word == word.lower() for word in words)
