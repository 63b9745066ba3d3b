"""How a text became its tokens, step by step, by the algorithm the vocabulary was made for.

    BPE         which two pieces merged, with which rank, and the pieces after each merge
    WordPiece   the longest piece that begins the rest of the word, again and again
    Unigram     every piece that fits somewhere (the lattice), and the most probable path through it

The steps come from the short reference encoders and the production path encodes the same text; where the two ever
disagree the explanation says so (`agrees`) instead of telling a plausible story.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from headspring.artifacts import UserError
from headspring.tokenization.reference import bpe, unigram, wordpiece
from headspring.tokenization.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenView:
    """One token of the production path: `start … end − 1` are bytes of the text."""

    id: int
    token: str
    bytes: str  # hexadecimal
    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Step:
    """What happened (`action`), the number that decided (a merge's rank, a log-probability) and the pieces after it."""

    action: str
    score: float | None
    pieces: list[str]


@dataclass(frozen=True)
class Word:
    """One piece of the text that the pre-tokenizer cut off, and how it was spelled."""

    word: str
    steps: list[Step]
    pieces: list[str]
    lattice: list[unigram.Edge] = field(default_factory=list)
    log_prob: float | None = None


@dataclass(frozen=True)
class Explanation:
    text: str
    kind: str
    normalized: str
    tokens: list[TokenView]
    words: list[Word]
    agrees: bool

    def to_json(self) -> dict[str, Any]:
        """A JSON value; lattice edges as objects."""
        value = asdict(self)
        for word, original in zip(value["words"], self.words):
            word["lattice"] = [edge._asdict() for edge in original.lattice]
        return value

    def __rich__(self) -> Group:
        return Group(*_render(self))


def explain(tokenizer: Tokenizer, text: str) -> Explanation:
    """Explain `text`. Raises `UserError` for a kind of model without steps (WordLevel)."""
    ids, spans = tokenizer.encode_with_spans(text)
    data = text.encode()
    tokens = []
    for i, (start, end) in zip(ids.tolist(), spans.tolist()):
        raw = tokenizer.token_bytes(i)
        shown = data[start:end].decode("utf-8", "replace")
        tokens.append(TokenView(i, tokenizer.token(i), raw.hex(" "), shown, start, end))
    normalizer, splitter = tokenizer.library.normalizer, tokenizer.library.pre_tokenizer
    normalized = normalizer.normalize_str(text) if normalizer else text
    parts = [word for word, _ in splitter.pre_tokenize_str(normalized)] if splitter else [normalized]
    words = [_explain_word(tokenizer, word) for word in parts if word]
    spelled = [piece for word in words for piece in word.pieces]
    return Explanation(text, tokenizer.kind, normalized, tokens, words, spelled == [view.token for view in tokens])


def _explain_word(tokenizer: Tokenizer, word: str) -> Word:
    explainers = {"BPE": _explain_bpe, "WordPiece": _explain_wordpiece, "Unigram": _explain_unigram}
    if tokenizer.kind not in explainers:
        raise UserError(f"a {tokenizer.kind} tokenizer looks words up: there are no steps to explain")
    return explainers[tokenizer.kind](tokenizer, word)


def _explain_bpe(tokenizer: Tokenizer, word: str) -> Word:
    model = tokenizer.description["model"]
    if model.get("ignore_merges") and word in model["vocab"]:
        return Word(word, [Step("the whole word is in the vocabulary", None, [word])], [word])
    ranks = _ranks(tokenizer)
    symbols = [symbol for character in word for symbol in _first_symbols(model, character)]
    steps = [Step("characters" if tokenizer.scheme.family != "byte-level" else "bytes", None, symbols)]
    for rank, (left, right), pieces in bpe.steps(symbols, ranks):
        steps.append(Step(f"{left} + {right}", rank, pieces))
    return Word(word, steps, steps[-1].pieces)


def _ranks(tokenizer: Tokenizer) -> dict[bpe.Pair, int]:
    merges = tokenizer.description["model"]["merges"]
    pairs = (tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in merges)
    return {(left, right): rank for rank, (left, right) in enumerate(pairs)}


def _first_symbols(model: dict[str, Any], character: str) -> list[str]:
    """A character's symbol, its bytes where the vocabulary lacks it, or the unknown token."""
    if character in model["vocab"]:
        return [character]
    pieces = [f"<0x{byte:02X}>" for byte in character.encode()]
    if model.get("byte_fallback") and all(piece in model["vocab"] for piece in pieces):
        return pieces
    return [model["unk_token"]] if model.get("unk_token") else []


def _explain_wordpiece(tokenizer: Tokenizer, word: str) -> Word:
    model = tokenizer.description["model"]
    prefix = model["continuing_subword_prefix"]
    too_long = len(word) > model["max_input_chars_per_word"]
    pieces = [model["unk_token"]] if too_long else wordpiece.encode(word, model["vocab"], model["unk_token"], prefix)
    steps, done = [], 0
    for number, piece in enumerate(pieces):
        done += len(piece.removeprefix(prefix)) if number else len(piece)
        if piece == model["unk_token"]:
            reason = "the word is too long" if too_long else "nothing begins a rest of the word"
            steps.append(Step(f"{reason}: unknown", None, [piece]))
        else:
            steps.append(Step(f"longest match {piece}, rest {word[done:]!r}", None, pieces[: number + 1]))
    return Word(word, steps, pieces)


def _explain_unigram(tokenizer: Tokenizer, word: str) -> Word:
    model = tokenizer.description["model"]
    edges = unigram.lattice(word, _scores(tokenizer), longest=_longest(tokenizer))
    edges = sorted([*edges, *_uncovered(word, edges, model)])
    path, log_prob = unigram.viterbi(edges, len(word))
    pieces: list[str] = []
    for edge in path:
        known = edge.piece in _scores(tokenizer)
        pieces += [edge.piece] if known else _unknown_pieces(model, edge.piece, pieces)
    total, steps = 0.0, []
    for number, edge in enumerate(path):
        total += edge.log_prob
        steps.append(Step(f"{edge.piece} (log p {edge.log_prob:.2f})", total, [e.piece for e in path[: number + 1]]))
    return Word(word, steps, pieces, edges, log_prob)


def _scores(tokenizer: Tokenizer) -> dict[str, float]:
    model = tokenizer.description["model"]
    hidden = {*tokenizer.control, model["vocab"][model["unk_id"]][0] if model.get("unk_id") is not None else None}
    fallback = model.get("byte_fallback")
    vocab = ((piece, score) for piece, score in model["vocab"] if piece not in hidden)
    return {p: s for p, s in vocab if not (fallback and len(p) == 6 and p.startswith("<0x"))}


def _longest(tokenizer: Tokenizer) -> int:
    return max(len(piece) for piece, _ in tokenizer.description["model"]["vocab"])


def _uncovered(word: str, edges: list[unigram.Edge], model: dict[str, Any]) -> list[unigram.Edge]:
    """Characters that no piece of their own covers, at the library's price: 10 below the lowest score."""
    single = {edge.start for edge in edges if edge.end == edge.start + 1}
    price = min(score for _, score in model["vocab"]) - 10
    return [unigram.Edge(i, i + 1, c, price) for i, c in enumerate(word) if i not in single]


def _unknown_pieces(model: dict[str, Any], character: str, before: list[str]) -> list[str]:
    if model.get("byte_fallback"):
        return [f"<0x{byte:02X}>" for byte in character.encode()]
    unknown = model["vocab"][model["unk_id"]][0]
    return [] if before and before[-1] == unknown else [unknown]  # the library fuses neighbours


def _table(title: str) -> Table:
    return Table(title=Text(title, no_wrap=True), title_justify="left", box=None, padding=(0, 2, 0, 0))


def _render(explanation: Explanation) -> list[Any]:
    parts: list[Any] = []
    for word in explanation.words:
        table = _table(f"{explanation.kind}: {word.word}")
        table.add_column("step", justify="right")
        table.add_column("what")
        table.add_column("total log p" if explanation.kind == "Unigram" else "rank", justify="right")
        table.add_column("pieces")
        for number, step in enumerate(word.steps):
            score = "" if step.score is None else f"{step.score:.2f}" if word.lattice else f"{step.score:.0f}"
            table.add_row(str(number), Text(step.action), score, Text(" ".join(step.pieces)))
        parts.append(table)
        if word.lattice:
            fits = ", ".join(f"{edge.piece} {edge.log_prob:.1f}" for edge in word.lattice if edge.end > edge.start + 1)
            parts.append(Text(f"  also considered: {fits or 'single characters only'}"))
    table = _table(f"{len(explanation.tokens)} tokens")
    for name in ("id", "token", "bytes", "text", "span"):
        table.add_column(name, justify="right" if name == "id" else "left")
    for view in explanation.tokens:
        span = f"{view.start}–{view.end}"
        table.add_row(str(view.id), Text(view.token), view.bytes, Text(repr(view.text)), span)
    parts.append(table)
    if not explanation.agrees:
        parts.append(Text("These steps do not lead to these tokens: added tokens or a normaliser took part.", "yellow"))
    return parts
