"""Which documents are good enough: published rules, grouped in profiles, every score kept and every decision explained.

A profile is a list of rules with bounds, in the order in which they decide. All of a profile's scores are computed and
stored, the first rule that fails names the decision, and the reason is the comparison itself:
`gopher.mean_word_length 12.3 > 10`.

- `prose`: Gopher quality and repetition, C4's document rules and FineWeb at the published thresholds. All must hold,
  so their order decides only which one is named. Nothing in the text is changed. C4's bracket rule is left out: it is
  there to drop web pages with code, and it would drop every note that quotes a line of it.
- `web`: FineWeb's whole chain for pages from a crawl: `prose` with the bracket rule, and with C4's line rules, which
  remove lines (the document is then no longer `verbatim`).
- `docstring`: for short technical texts. The same measures with wider bounds (ours): at least 5 words instead of 50, no
  stop words asked for, and only the repetition rules that mean something in ten lines.
- `code`: what Codex, The Stack and CodeParrot use. No prose rule runs on code.
- `none`: only empty documents go.

What this gives up: no model judges quality here (FineWeb-Edu and DCLM show how much that gains on web text).
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from headspring.artifacts.errors import UserError
from headspring.data.cleaning_rules import MEASURES, Analysis
from headspring.text.documents import Document
from headspring.text.sources.base import Bound, Profile, SourceConfig

EMPTY = "empty"
DROPPED_LINES = "c4.dropped_lines"  # share of lines that the line rules removed; a column without a bound

GOPHER_REPETITION: dict[str, Bound] = {
    "gopher_repetition.duplicate_paragraphs": (None, 0.30),
    "gopher_repetition.duplicate_paragraph_characters": (None, 0.20),
    "gopher_repetition.duplicate_lines": (None, 0.30),
    "gopher_repetition.duplicate_line_characters": (None, 0.20),
    "gopher_repetition.top_2_gram": (None, 0.20),
    "gopher_repetition.top_3_gram": (None, 0.18),
    "gopher_repetition.top_4_gram": (None, 0.16),
    "gopher_repetition.duplicate_5_grams": (None, 0.15),
    "gopher_repetition.duplicate_6_grams": (None, 0.14),
    "gopher_repetition.duplicate_7_grams": (None, 0.13),
    "gopher_repetition.duplicate_8_grams": (None, 0.12),
    "gopher_repetition.duplicate_9_grams": (None, 0.11),
    "gopher_repetition.duplicate_10_grams": (None, 0.10),
}
GOPHER_QUALITY: dict[str, Bound] = {
    "gopher.words": (50, 100_000),
    "gopher.mean_word_length": (3, 10),
    "gopher.hashes_per_word": (None, 0.1),
    "gopher.ellipses_per_word": (None, 0.1),
    "gopher.bullet_lines": (None, 0.9),
    "gopher.ellipsis_lines": (None, 0.3),
    "gopher.alphabetic_words": (0.8, None),
    "gopher.stop_words": (2, None),
}
C4: dict[str, Bound] = {"c4.lorem_ipsum": (None, 0), "c4.curly_brackets": (None, 0), "c4.sentences": (5, None)}
FINEWEB: dict[str, Bound] = {
    "fineweb.terminal_punctuation_lines": (0.12, None),
    "fineweb.short_lines": (None, 0.67),
    "fineweb.duplicate_line_characters": (None, 0.01),
    "fineweb.newlines_per_word": (None, 0.3),
}
WEB = GOPHER_QUALITY | GOPHER_REPETITION | C4 | FINEWEB
PROFILES: dict[Profile, dict[str, Bound]] = {
    "prose": {name: bound for name, bound in WEB.items() if name != "c4.curly_brackets"},
    "web": WEB,
    "docstring": {
        "gopher_repetition.duplicate_lines": (None, 0.5),
        "gopher_repetition.duplicate_line_characters": (None, 0.4),
        "gopher.words": (5, 100_000),
        "gopher.mean_word_length": (2, 14),
        "gopher.alphabetic_words": (0.3, None),
        "c4.lorem_ipsum": (None, 0),
    },
    "code": {
        "code.longest_line": (None, 1000),
        "code.mean_line_length": (None, 100),
        "code.alphanumeric": (0.25, None),
        "code.generated": (None, 0),
    },
    "none": {},
}

CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


@dataclass(frozen=True)
class Verdict:
    """What the rules said: `decision` is the first rule that failed, or None to keep `text`."""

    text: str
    decision: str | None
    reason: str
    scores: dict[str, float]


def bounds_of(source: SourceConfig, profile: Profile, name: str = "") -> dict[str, Bound]:
    """The profile's rules with the source's own changes. Raises `UserError` for a rule that does not exist."""
    bounds = dict(PROFILES[profile])
    for rule, bound in source.rules.items():
        if rule not in MEASURES:
            near = difflib.get_close_matches(rule, MEASURES, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(MEASURES)}"
            raise UserError(f"source {name!r}: no cleaning rule {rule!r}{hint}")
        if bound is None:
            bounds.pop(rule, None)
        else:
            bounds[rule] = bound
    return bounds


def score_columns(sources: Mapping[str, SourceConfig]) -> list[str]:
    """Names of all rules that can run on any of these sources, in the order of `MEASURES`."""
    changed = {rule for source in sources.values() for rule in source.rules}
    used = changed.union(*(bounds for bounds in PROFILES.values()))
    return [name for name in MEASURES if name in used] + [DROPPED_LINES]


def clean(document: Document, profile: Profile, bounds: Mapping[str, Bound]) -> Verdict:
    """Score a document on every rule in `bounds` and decide. Only profile `web` changes the text."""
    text = document.text
    if not text or text.isspace():
        return Verdict(text, EMPTY, "no characters but white space", {})
    analysis = Analysis(text)
    scores: dict[str, float] = {}
    if profile == "web":
        # FineWeb's order: Gopher sees the page as read, C4's sentence count and FineWeb what the line rules left.
        text, scores[DROPPED_LINES] = drop_lines(text)
    edited = Analysis(text) if text != analysis.text else analysis
    for rule in bounds:
        after_lines = rule.startswith(("c4.sentences", "fineweb."))
        scores[rule] = MEASURES[rule](edited if after_lines else analysis)
    for rule, (minimum, maximum) in bounds.items():
        score = scores[rule]
        if minimum is not None and score < minimum:
            return Verdict(text, rule, f"{rule} {score:.4g} < {minimum:g}", scores)
        if maximum is not None and score > maximum:
            return Verdict(text, rule, f"{rule} {score:.4g} > {maximum:g}", scores)
    if not text:
        return Verdict(text, EMPTY, "the line rules of C4 left nothing", scores)
    return Verdict(text, None, "", scores)


def drop_lines(text: str) -> tuple[str, float]:
    """C4's line rules as FineWeb uses them (lines need no final punctuation): the text left, the share of lines gone.

    A line goes if it has fewer than 3 words, a word of more than 1,000 characters, "javascript" or a policy phrase;
    citation marks such as [3] go from the others."""
    lines = text.splitlines()
    kept = [CITATION.sub("", line.strip()) for line in lines if _is_line_kept(line)]
    return "\n".join(kept).strip(), 1 - len(kept) / len(lines) if lines else 0.0


def _is_line_kept(line: str) -> bool:
    words, lower = line.split(), line.lower()
    too_long = len(line) > 1000 and any(len(word) > 1000 for word in words)
    return len(words) >= 3 and not too_long and "javascript" not in lower and not any(p in lower for p in POLICY)
