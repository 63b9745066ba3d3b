"""The tokenizer: text to ids and back, with exact byte spans, and typed.

It wraps `tokenizers.Tokenizer`, whose `tokenizer.json` everybody reads, and adds what a laboratory needs: every id
knows its bytes and its place in the text; a string can never become a control token (see `typed`); a conversation
can, and only through `render`; ids become text one by one without broken characters.
"""

import json
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import count, takewhile
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer as LibraryTokenizer

from headspring.artifacts import UserError
from headspring.artifacts.files import write_atomic, write_json
from headspring.text import chat
from headspring.tokenization import rendering, splitting
from headspring.tokenization.pieces import BYTE_PIECE, scheme_of, spans_from_lengths, spans_from_offsets
from headspring.tokenization.prompt_start import with_start
from headspring.tokenization.ranks import RankEncoder, rank_encoder
from headspring.tokenization.stream import StreamDecoder
from headspring.tokenization.typed import control_tokens, plain_twin, unknown_token


class Tokenizer:
    """Text ↔ ids.

    `library` is the wrapped tokenizer. `bos_token`, `eos_token`, `pad_token`, `mask_token` and `chat_template` are names a
    foreign tokenizer gave in its `tokenizer_config.json`; Headspring's own control tokens are found by their names.
    `add_bos`: whether a prompt begins with the bos; some name one for their chat template only.
    """

    def __init__(
        self,
        library: LibraryTokenizer,
        bos_token: str | None = None,
        eos_token: str | None = None,
        pad_token: str | None = None,
        chat_template: str | None = None,
        add_bos: bool = True,
        mask_token: str | None = None,
    ):
        self.library = library
        self.description: dict[str, Any] = json.loads(library.to_str())
        self.control: dict[str, int] = control_tokens(self.description)
        self.control_ids = frozenset(self.control.values())
        self.scheme = scheme_of(self.description)
        self.chat_template = chat_template
        self.add_bos = add_bos
        self.bos_token = self._known(bos_token, chat.BOS)
        self.eos_token = self._known(eos_token, chat.EOS)
        self.pad_token = self._known(pad_token, chat.PAD)
        self.mask_token = self._known(mask_token, chat.MASK)
        vocab = library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self._twin, self._renumber = plain_twin(self.description, self.control)
        self._bytes = self._token_bytes(vocab)
        self._lengths = np.array([len(piece) for piece in self._bytes], np.int64)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """A tokenizer folder, a run, a `tokenizer.json`, SentencePiece `*.model`, `vocab.txt`, `merges.txt` or `.gguf`."""
        from headspring.tokenization.formats import load

        return load(Path(path))

    def save(self, folder: str | Path, prompt_start: bool = False) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, as `transformers` and every other engine reads them.

        `prompt_start`: other programs shall begin a prompt as `LanguageModel` does, with the bos."""
        folder, content = Path(folder), self.library.to_str(pretty=True)
        if prompt_start and self.add_bos and self.bos_token is not None and self.bos_id is not None:
            content = with_start(self.description, self.bos_token, self.bos_id)
        write_atomic(folder / "tokenizer.json", content)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "pad_token": self.pad_token,
            "mask_token": self.mask_token,
            "add_bos_token": None if self.add_bos else False,
            "unk_token": unknown_token(self.description),
            "additional_special_tokens": list(self.control),
            "chat_template": self.template,
            "clean_up_tokenization_spaces": False,
        }
        write_json(folder / "tokenizer_config.json", {key: value for key, value in config.items() if value is not None})

    # -- names -------------------------------------------------------------------------------------------------------

    @property
    def kind(self) -> str:
        """The model's family: BPE, WordPiece, Unigram or WordLevel."""
        return self.description["model"]["type"]

    @property
    def bos_id(self) -> int | None:
        return self.control.get(self.bos_token or "")

    @property
    def eos_id(self) -> int | None:
        return self.control.get(self.eos_token or "")

    @property
    def pad_id(self) -> int | None:
        return self.control.get(self.pad_token or "")

    @property
    def mask_id(self) -> int | None:
        """The id that stands for a hidden token; None where the tokenizer was not made for encoders."""
        return self.control.get(self.mask_token or "")

    @cached_property
    def sentinel_ids(self) -> list[int]:
        """The control tokens that stand for the first span, the second, and so on; T5's under their own names."""
        for form in (chat.SENTINEL, "<extra_id_{}>"):
            found = takewhile(lambda token: token in self.control, map(form.format, count()))
            if ids := [self.control[token] for token in found]:
                return ids
        return []

    @cached_property
    def end_id(self) -> int | None:
        """The control token that ends a turn: `<|end|>`, or what a foreign chat template writes after a message."""
        if chat.END in self.control:
            return self.control[chat.END]
        if self.chat_template is None:
            return None
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        rendered = rendering.render(self, turns)
        ends = [int(i) for i in rendered.ids[rendered.trained] if i in self.control_ids]
        return ends[0] if ends else None

    @cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """What a whole text stands between: what the file's own post-processor writes (`[CLS]` … `[SEP]`), or, where there
        is none, what a training document has (`<|bos|>` … `<|eos|>`)."""
        if self.library.post_processor is None:
            return [i for i in (self.bos_id,) if i is not None], [i for i in (self.eos_id,) if i is not None]
        plain = self._twin.encode("a", add_special_tokens=False)
        inside, framed = list(plain.ids), self.library.post_processor.process(plain).ids
        start = next(i for i in range(len(framed)) if framed[i : i + len(inside)] == inside)
        return framed[:start], framed[start + len(inside) :]

    @property
    def template(self) -> str | None:
        """The Jinja chat template that gives the same ids as `render`, or None where the tokenizer cannot chat."""
        own = all(token in self.control for token in (chat.BOS, chat.END, *chat.ROLE_TOKENS.values()))
        return chat.JINJA_TEMPLATE if own else self.chat_template

    @property
    def unk_id(self) -> int | None:
        """The id of what the vocabulary cannot spell; None where it spells everything."""
        token = unknown_token(self.description)
        return None if token is None else self.library.token_to_id(token)

    @property
    def spells_bytes(self) -> bool:
        """Whether tokens store their spaces, so that text is the tokens' bytes joined."""
        return self.scheme.family in ("byte-level", "sentencepiece")

    def is_byte_piece(self, id: int) -> bool:
        """Whether the token is a lone byte in SentencePiece's spelling, such as `<0x0A>`."""
        return bool(self._is_byte[id])

    def token(self, id: int) -> str:
        """The vocabulary's own spelling of a token, such as `Ġthe`; "" for an id that was never assigned."""
        self._check([id])
        return self.library.id_to_token(int(id)) or ""

    def token_bytes(self, id: int) -> bytes:
        """The bytes of a token; a control token's are its name's."""
        self._check([id])
        return self._bytes[id]

    def ids_with_prefix(self, prefix: bytes) -> np.ndarray:
        """(k,) int64: ordinary tokens whose bytes begin with `prefix` or are it; what token healing allows."""
        if not prefix:
            raise ValueError("every token begins with the empty prefix")
        pieces, ids = self._sorted_bytes
        first = bisect_left(pieces, prefix)
        last = bisect_left(pieces, True, lo=first, key=lambda piece: not piece.startswith(prefix))
        return np.sort(np.asarray(ids[first:last], np.int64))

    # -- text to ids -------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """The ids of `text` as plain text: never a control id, never a bos. Raises `UserError` for lone surrogates."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many texts, on all threads the library was given."""
        if isinstance(texts, str) or self._ranks is None:
            return self._encode_with_library(texts)
        return self._ranks.encode_batch(texts, otherwise=self._encode_with_library)

    def _encode_with_library(self, texts: Sequence[str]) -> list[list[int]]:
        joined: list[list[int]] = [[] for _ in texts]
        for index, encoding in self._encodings(texts, offsets=False):
            joined[index] += self._ids(encoding)
        return joined

    def encode_with_spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """ids (n,) int64 and byte spans (n, 2) int64 in `text.encode()`."""
        return self.encode_batch_with_spans([text])[0]

    def encode_batch_with_spans(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """`encode_with_spans` of many texts at once."""
        if self.scheme.exact:
            ids = [np.asarray(row, np.int64) for row in self.encode_batch(texts)]
            return [(row, spans_from_lengths(self._lengths[row])) for row in ids]
        pairs = []
        for index, encoding in self._encodings(texts, offsets=True):
            row = np.asarray(self._ids(encoding), np.int64)
            pairs.append((row, spans_from_offsets(texts[index], encoding.offsets, self._is_byte[row])))
        return pairs

    # -- ids to text -------------------------------------------------------------------------------------------------

    def decode(self, ids: Iterable[int], control: Literal["skip", "show"] = "skip") -> str:
        """Text of ids. Bytes that are not UTF-8 become U+FFFD; control tokens are left out, or shown by name."""
        rows = [int(i) for i in ids]
        self._check(rows)
        if control == "skip":
            return self._decode_plain([i for i in rows if i not in self.control_ids])
        text, run = [], list[int]()
        for i in rows:
            if i in self.control_ids:
                text += [self._decode_plain(run), self.token(i)]
                run = []
            else:
                run.append(i)
        return "".join([*text, self._decode_plain(run)])

    def stream(self) -> StreamDecoder:
        """A decoder that takes one id at a time."""
        return StreamDecoder(self)

    def render(self, messages: rendering.Messages, add_generation_prompt: bool = False) -> rendering.Rendered:
        """A conversation's ids, what of them is trained, and where each came from."""
        return rendering.render(self, messages, add_generation_prompt)

    # -- inside ------------------------------------------------------------------------------------------------------

    @cached_property
    def _ranks(self) -> RankEncoder | None:
        return rank_encoder(self.description, self._twin, self.control)

    @cached_property
    def _sorted_bytes(self) -> tuple[list[bytes], list[int]]:
        pairs = [(piece, i) for i, piece in enumerate(self._bytes) if piece and i not in self.control_ids]
        pairs = sorted(pair for pair in pairs if pair[1] != self.unk_id)
        return [piece for piece, _ in pairs], [i for _, i in pairs]

    @cached_property
    def _is_byte(self) -> np.ndarray:
        """(vocab,) bool: byte-fallback tokens such as `<0x0A>`."""
        tokens = (self.library.id_to_token(i) or "" for i in range(self.vocab_size))
        return np.array([self.scheme.family == "sentencepiece" and bool(BYTE_PIECE.fullmatch(t)) for t in tokens], bool)

    def _encodings(self, texts: Sequence[str], offsets: bool) -> Iterable[tuple[int, Any]]:
        """(index of the text, library encoding); a huge text comes in several, cut where no token can cross."""
        if isinstance(texts, str):
            raise TypeError("expected a sequence of strings, not one string")
        cut = self.scheme.exact and splitting.is_own(self.description.get("pre_tokenizer"))
        chunks = [(i, part) for i, text in enumerate(texts) for part in (splitting.chunks(text) if cut else [text])]
        run = self._twin.encode_batch if offsets else self._twin.encode_batch_fast
        try:
            encodings = run([part for _, part in chunks], add_special_tokens=False)
        except (UnicodeEncodeError, TypeError) as error:
            raise UserError("text with lone surrogates is not Unicode; decode its bytes with errors='replace'") from error
        return zip((index for index, _ in chunks), encodings, strict=True)

    def _ids(self, encoding: Any) -> list[int]:
        return encoding.ids if self._renumber is None else self._renumber[encoding.ids].tolist()

    def _decode_plain(self, ids: list[int]) -> str:
        if not self.spells_bytes:
            return self.library.decode(ids, skip_special_tokens=False)
        joined = b"".join([self._bytes[i] for i in ids])
        if self.scheme.drops_leading_space:
            joined = joined.removeprefix(b" ")
        return joined.decode("utf-8", "replace")

    def _token_bytes(self, vocab: dict[str, int]) -> list[bytes]:
        table = [b""] * self.vocab_size
        for token, i in vocab.items():
            table[i] = self.scheme.bytes_of(token)
        for added in self.description.get("added_tokens", []):
            table[added["id"]] = added["content"].encode()
        return table

    def _known(self, name: str | None, own: str) -> str | None:
        return name if name in self.control else own if own in self.control else None

    def _check(self, ids: Sequence[int]) -> None:
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise UserError(f"token id {wrong} is outside the vocabulary of {self.vocab_size} tokens")

    def __repr__(self) -> str:
        return f"Tokenizer({self.kind}, {self.scheme.family}, {self.vocab_size} tokens, {len(self.control)} control)"
