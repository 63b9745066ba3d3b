"""Token ids in, text out, while it is being made: whole UTF-8 characters, and nothing of a stop string.

The tokenizer's stream decoder holds back the bytes of an unfinished character. This class holds back the longest end
of the text that could still become a stop string, so what has been released never has to be taken back. What it
gives up: such an end arrives a token later than it could.
"""

from headspring.tokenization.tokenizer import Tokenizer


class TextStream:
    """The text of one answer. `stopped` is true once a stop string was found; the text ends before it."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()):
        self._decoder = tokenizer.stream()
        self._stop = stop
        self._pending = ""
        self._released: list[str] = []
        self.stopped = False

    @property
    def text(self) -> str:
        """All that was released so far."""
        return "".join(self._released)

    def push(self, token_id: int, may_stop: bool = True) -> str:
        """The text that this token makes certain, possibly empty."""
        self._pending += self._decoder.push(token_id)
        if not may_stop:
            return self._release(len(self._pending))
        found = [place for place in map(self._pending.find, self._stop) if place >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self._pending) - self._open_end())

    def finish(self) -> str:
        """What was held back; U+FFFD for a character that stayed unfinished. Nothing after a stop string."""
        if self.stopped:
            return ""
        self._pending += self._decoder.finish()
        return self._release(len(self._pending))

    def _release(self, length: int) -> str:
        piece, self._pending = self._pending[:length], self._pending[length:]
        self._released.append(piece)
        return piece

    def _open_end(self) -> int:
        """Length of the longest end of the pending text that begins a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(self._pending)), 0, -1):
            if any(stop.startswith(self._pending[-length:]) for stop in self._stop):
                return length
        return 0
