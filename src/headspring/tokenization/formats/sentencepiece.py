"""SentencePiece `.model` files, as a pipeline of the library.

The file is a protobuf: pieces with score and type, what was trained, and how text is normalised. Each part has a
counterpart: the character map becomes a `Precompiled` normaliser, the space rules become normalisers too, a Unigram
vocabulary is taken as it is. A BPE vocabulary has no list of merges: any two pieces whose join is a piece may merge,
the join's score is the priority, so the list is rebuilt in that order.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers
from tokenizers import Tokenizer as LibraryTokenizer

from headspring.artifacts import UserError
from headspring.tokenization.pieces import META
from headspring.tokenization.tokenizer import Tokenizer

# Values of the enums in sentencepiece_model.proto.
UNIGRAM, BPE = 1, 2
UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5


def load_sentencepiece(file: Path) -> Tokenizer:
    """A Unigram or BPE model. Raises `UserError` for other types and for files that are none."""
    proto = _parse(file)
    trainer, pieces = proto.trainer_spec, list(proto.pieces)
    vocab = [(piece.piece, piece.score) for piece in pieces]
    unknown = next((i for i, piece in enumerate(pieces) if piece.type == UNKNOWN), None)
    if trainer.model_type == UNIGRAM:
        library = LibraryTokenizer(models.Unigram(vocab, unknown, trainer.byte_fallback))
    elif trainer.model_type == BPE:
        library = LibraryTokenizer(bpe_model(vocab, unknown, trainer.byte_fallback))
    else:
        raise UserError(f"{file}: a SentencePiece model of type word or char; only unigram and bpe can be loaded")
    if trainer.treat_whitespace_as_suffix:
        raise UserError(f"{file}: spaces are suffixes in this SentencePiece model, which the library cannot express")
    set_pipeline(library, proto.normalizer_spec)
    library.add_special_tokens([_added(p.piece, True) for p in pieces if p.type in (CONTROL, UNUSED)])
    library.add_tokens([_added(p.piece, False) for p in pieces if p.type == USER_DEFINED])
    ids = {"bos_token": trainer.bos_id, "eos_token": trainer.eos_id, "pad_token": trainer.pad_id}
    return Tokenizer(library, **{role: pieces[i].piece for role, i in ids.items() if 0 <= i < len(pieces)})


def _parse(file: Path) -> Any:
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise UserError("SentencePiece models need an extra: pip install 'headspring[sentencepiece]'") from error
    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(file.read_bytes())
    if not proto.pieces:
        raise UserError(f"{file}: not a SentencePiece model (no pieces)")
    return proto


def bpe_model(vocab: list[tuple[str, float]], unknown: int | None, byte_fallback: bool) -> models.BPE:
    ids = {piece: i for i, (piece, _) in enumerate(vocab)}
    merges = []
    for i, (piece, score) in enumerate(vocab):
        splits = ((piece[:k], piece[k:]) for k in range(1, len(piece)))
        merges += [(-score, i, ids[a], ids[b], a, b) for a, b in splits if a in ids and b in ids]
    ordered = [(left, right) for *_, left, right in sorted(merges)]
    token = None if unknown is None else vocab[unknown][0]
    return models.BPE(ids, ordered, unk_token=token, fuse_unk=True, byte_fallback=byte_fallback)


def set_pipeline(library: LibraryTokenizer, spec: Any) -> None:
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:  # also before a text that begins with a space, which `Metaspace` would leave as it is
        steps.append(normalizers.Prepend(META))
    library.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", META)])
    strip = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    library.decoder = decoders.Sequence([decoders.Replace(META, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])


def _added(token: str, special: bool) -> AddedToken:
    return AddedToken(token, special=special, normalized=False)
