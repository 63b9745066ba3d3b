"""Structured output: answers that match a JSON schema, a regular expression, one of some choices, or a grammar.

Before each token, llguidance walks its parser over the vocabulary and says which tokens the text so far can be followed by; the
others get no probability. A token is allowed by its bytes alone, so text stays typed: a control token matches nothing, and an
end token is allowed exactly where the text is complete. An answer that ends by itself therefore matches; one that is cut by
`max_tokens` says so, by its finish_reason "length".

    Structured(regex=…)  ── compile ──→  Compiled  ── matcher() ──→  Matcher, one an answer: mask · accept · rollback · fork

It fails closed. What the compiler does not know (a keyword of JSON Schema, say) is refused with its name; a matcher that gives
up while it runs fails its request; nothing is ever ignored and then sampled freely. Schemas come from strangers, so `Budget`
bounds bytes, depth and nodes before anything is parsed, and work and time after that.

A model left alone with a grammar may go on for ever inside it: spaces between JSON's tokens, digits of a number. Both are
bounded here; strings are not, since their length is for `maxLength` to say.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from pydantic import Field, field_validator, model_validator

from headspring.artifacts import HeadspringError, UserError, Value
from headspring.inference.structured_budget import Budget, check_size, nesting
from headspring.tokenization.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

LARGEST, DEEPEST = 2**20, 200  # bytes and depth of what is looked at at all
SPACE = r"(?: |\n {0,32})?"  # between the tokens of JSON: what compact, usual and indented JSON need
JSON_OPTIONS = {"whitespace_flexible": True, "whitespace_pattern": SPACE, "lenient": False, "coerce_one_of": False}
LONGEST_NUMBER = 40  # bytes of a JSON number after which no digit may follow
IN_NUMBER = b"0123456789+-.eE"
# Places in a grammar that a text may be at; an ambiguous grammar reaches them while a step is still a twentieth of a second.
ROW_ITEMS, STEP_ITEMS = 500, 10_000
CACHED = 64  # compiled specifications a tokenizer


class Structured(Value):
    """What a text must match; exactly one of these.

    `json_schema`: JSON Schema as a mapping, or as its text. `regex` matches the whole text (Rust's dialect: no back-references,
    no look-around). `grammar` is in Lark's notation as llguidance reads it, from the rule `start` on."""

    json_schema: dict[str, Any] | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = Field(None, min_length=1)
    grammar: str | None = None

    @field_validator("json_schema", mode="before")
    @classmethod
    def _from_text(cls, schema: Any) -> Any:
        if not isinstance(schema, str):
            return schema
        if len(schema) > LARGEST or nesting(schema) > DEEPEST:
            raise ValueError(f"this schema has more than {LARGEST:,} characters or {DEEPEST} levels")
        return json.loads(schema)

    @model_validator(mode="after")
    def _one_of_them(self) -> "Structured":
        if sum(field is not None for field in (self.json_schema, self.regex, self.choice, self.grammar)) != 1:
            raise ValueError("give exactly one of json_schema, regex, choice and grammar")
        return self


class Compiled:
    """A specification made ready for one tokenizer; `matcher()` gives one for a new answer."""

    def __init__(self, first: "Matcher"):
        self._first = first

    def matcher(self) -> "Matcher":
        return self._first.fork()


class Matcher:
    """How far one answer has come. `size` is the number of the tokenizer's ids."""

    def __init__(self, parser: "LLMatcher", words: "Words", number: "Number | None"):
        self._parser, self._words, self._number = parser, words, number

    @property
    def complete(self) -> bool:
        """Whether the text so far matches, so that it may end here."""
        return self._parser.is_accepting()

    def mask(self) -> np.ndarray:
        """(V,) bool: the tokens that may come next, V those of the tokenizer. Raises `HeadspringError` where none may, or where
        the parser has reached its limits."""
        bits = np.frombuffer(self._parser.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.unpackbits(bits, count=self._words.size, bitorder="little").view(bool) & self._words.usable
        if self._number is not None and self._number.is_long:
            without = allowed & ~self._words.digits
            allowed = without if without.any() else allowed
        if not allowed.any():
            raise HeadspringError("no token of this vocabulary can go on with the structured text")
        return allowed

    def masks(self, proposed: Sequence[int], first: int = 0) -> list[np.ndarray]:
        """The masks after `first` proposed tokens, which are allowed ones, and after each further one. They end where one is
        not allowed, or ends the text. The matcher stays where it is."""
        for token in proposed[:first]:
            self.accept(token)
        masks = [self.mask()]
        for token in proposed[first:]:
            if not masks[-1][token] or token in self._words.ends:
                break
            self.accept(token)
            masks.append(self.mask())
        self.rollback(first + len(masks) - 1)
        return masks

    def accept(self, token: int) -> None:
        """Take a token. Raises `HeadspringError` for one that the mask did not allow."""
        if not self._parser.consume_token(token):
            self._check()
            raise HeadspringError(f"token {token} does not go on with the structured text")
        if self._number is not None:
            self._number.push(self._words.bytes_of[token])

    def rollback(self, count: int) -> None:
        """Forget the last `count` tokens."""
        if count and not self._parser.rollback(count):
            self._check()
            raise HeadspringError(f"a structured text cannot go back by {count} tokens")
        if self._number is not None:
            self._number.pop(count)

    def fork(self) -> "Matcher":
        """Another one at the same place."""
        return Matcher(self._parser.deep_copy(), self._words, self._number and self._number.copy())

    def _check(self) -> None:
        if self._parser.is_error():
            raise HeadspringError(f"structured output failed: {one_line(self._parser.get_error())}")


class Number:
    """Where JSON's text stands inside a number, and how long that is: enough of a lexer to bound it."""

    def __init__(self, history: Sequence[tuple[bool, bool, int]] = ((False, False, 0),)):
        self._history = list(history)  # after each token: inside a string, after a backslash, length of the number

    @property
    def is_long(self) -> bool:
        return self._history[-1][2] >= LONGEST_NUMBER

    def push(self, piece: bytes) -> None:
        quoted, escaped, length = self._history[-1]
        for byte in piece:
            if quoted:
                quoted, escaped = escaped or byte != ord('"'), not escaped and byte == ord("\\")
            else:
                quoted, length = (
                    byte == ord('"'),
                    length + 1 if byte in b"0123456789+-.eE" and (length or byte in b"-0123456789") else 0,
                )
        self._history.append((quoted, escaped, length))

    def pop(self, count: int) -> None:
        del self._history[len(self._history) - count :]

    def copy(self) -> "Number":
        return Number(self._history)


# ---- compilation


def compile_structured(spec: Structured, tokenizer: Tokenizer, budget: Budget | None = None) -> Compiled:
    """`spec` for `tokenizer`, remembered for the next request that asks the same. Raises `UserError` for what is too large,
    wrong or not supported."""
    budget, words = budget or Budget(), words_of(tokenizer)
    check_size(spec, budget)
    key = spec.model_dump_json() + budget.model_dump_json()
    with words.lock:
        if key in words.compiled:
            words.compiled.move_to_end(key)
            return words.compiled[key]
    made = _within(budget.seconds, lambda: _make(spec, words, budget))
    with words.lock:
        words.compiled[key] = made
        if len(words.compiled) > CACHED:
            words.compiled.popitem(last=False)
    return made


def _make(spec: Structured, words: "Words", budget: Budget) -> Compiled:
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(
        max_grammar_size=budget.symbols, max_items_in_row=ROW_ITEMS, step_max_items=STEP_ITEMS, verbose_errors=False
    )
    parser = LLMatcher(words.library, grammar_of(spec, words.tokenizer), log_level=0, limits=limits)
    if parser.is_error():
        raise UserError(f"this structured output cannot be compiled: {one_line(parser.get_error())}")
    first = Matcher(parser, words, Number() if spec.json_schema is not None else None)
    try:
        first.mask()
    except HeadspringError as error:
        raise UserError(f"this structured output cannot begin: {error}") from None
    return Compiled(first)


def grammar_of(spec: Structured, tokenizer: Tokenizer) -> str:
    """What llguidance reads, as JSON. Where a text's first space is not shown, the answer has one before what must match."""
    from llguidance import LLMatcher

    if spec.json_schema is not None:
        body: dict[str, Any] = {"json_schema": {**spec.json_schema, "x-guidance": JSON_OPTIONS}}
    elif spec.regex is not None:
        body = json.loads(LLMatcher.grammar_from_regex(spec.regex))["grammars"][0]
    elif spec.choice is not None:
        body = {"lark_grammar": "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in spec.choice)}
    else:
        body = {"lark_grammar": spec.grammar}
    if not tokenizer.scheme.drops_leading_space:
        return json.dumps({"grammars": [body]})
    return json.dumps({"grammars": [{"lark_grammar": 'start: " " @body'}, {**body, "name": "body"}]})


def _within(seconds: float, make: Any) -> Compiled:
    """The result of `make`, on a thread of its own. A thread cannot be stopped: what runs on after the deadline is bounded by
    the parser's own limits, and nobody waits for it."""
    made: Future[Compiled] = Future()

    def work() -> None:
        try:
            made.set_result(make())
        except BaseException as error:
            made.set_exception(error)

    threading.Thread(target=work, name="structured-compile", daemon=True).start()
    try:
        return made.result(seconds)
    except Late:
        raise UserError(f"this structured output takes more than {seconds:g} seconds to compile; make it simpler") from None


def one_line(message: str) -> str:
    """What a parser's error of several lines says: where it is, and its line that begins with "error"."""
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()] or ["unknown error"]
    return " ".join([lines[0], *[line for line in lines[1:] if line.startswith("error")][:1]])[:300]


# ---- the vocabulary, as the parser wants it


class Words:
    """A tokenizer's vocabulary: the bytes of each id, which ids may come at all, and what was compiled for it."""

    def __init__(self, tokenizer: Tokenizer):
        from llguidance import LLTokenizer

        ends = [end for end in (tokenizer.eos_id, tokenizer.end_id) if end is not None]
        if not tokenizer.spells_bytes:
            raise UserError(f"structured output needs tokens that spell their spaces; this is {tokenizer!r}")
        if not ends:
            raise UserError("structured output needs an end token, and this tokenizer has none")
        self.tokenizer, self.size, self.ends = tokenizer, tokenizer.vocab_size, frozenset(ends)
        self.bytes_of = [b"" if i in tokenizer.control_ids else tokenizer.token_bytes(i) for i in range(self.size)]
        silent = {i for i in range(self.size) if not self.bytes_of[i] or i == tokenizer.unk_id}
        self.usable = np.array([i not in silent or i in self.ends for i in range(self.size)])
        self.digits = np.array([piece[:1].isdigit() for piece in self.bytes_of])
        self.lock = threading.Lock()
        self.compiled: OrderedDict[str, Compiled] = OrderedDict()
        self.library = LLTokenizer(_Vocabulary(self, sorted(silent), ends[0]), eos_token=ends)  # type: ignore[arg-type]


class _Vocabulary:
    """What llguidance asks of a tokenizer. Ids without text get bytes that are in no text."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, words: Words, silent: list[int], end: int):
        self.eos_token_id, self.special_token_ids = end, silent
        nothing = dict.fromkeys(silent)
        self.tokens = [b"\xff[%d]" % i if i in nothing else piece for i, piece in enumerate(words.bytes_of)]
        self._encode = words.tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


_words: "WeakKeyDictionary[Tokenizer, Words]" = WeakKeyDictionary()


def words_of(tokenizer: Tokenizer) -> Words:
    """The vocabulary of a tokenizer, made once (a twentieth of a second for 50,000 tokens)."""
    if tokenizer not in _words:
        _words[tokenizer] = Words(tokenizer)
    return _words[tokenizer]
