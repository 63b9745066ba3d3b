"""Text from ids as they come, one at a time, without ever showing half a character."""

import codecs
from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:
    from headspring.tokenization.tokenizer import Tokenizer


class StreamDecoder:
    """`push(id)` returns what can be shown now, possibly ""; `finish()` the rest. Joined, they equal `decode(ids)`.

    Bytes of an unfinished UTF-8 character are held back; those left at the end become U+FFFD. Control tokens are
    skipped. A vocabulary that does not store spaces (WordPiece) goes through the library's own stream.
    """

    def __init__(self, tokenizer: "Tokenizer"):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = tokenizer.scheme.drops_leading_space
        self._library = None if tokenizer.spells_bytes else DecodeStream(skip_special_tokens=False)

    def push(self, token: int) -> str:
        """Add one id; returns the characters it completes."""
        if token in self._tokenizer.control_ids:
            return ""
        if self._library is not None:
            return self._library.step(self._tokenizer.library, int(token)) or ""
        piece = self._tokenizer.token_bytes(token)
        if self._at_start:
            piece, self._at_start = piece.removeprefix(b" "), False
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """What is left: U+FFFD for a character that never became whole."""
        return self._utf8.decode(b"", final=True)
