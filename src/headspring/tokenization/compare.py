"""Tokenizers side by side: what each does to language, code and numbers, and what that costs the model later.

Nothing here ranks tokenizers by one number, for none exists: compression buys shorter sequences and pays with
embedding parameters, with rarer tokens, and with languages that were not in the training text.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from headspring.tokenization.cost import Cost, ModelShape, cost
from headspring.tokenization.healing import TrailingSpace
from headspring.tokenization.metrics import (
    CorpusMeasures,
    DigitSplitting,
    Parity,
    TokenFaults,
    digit_splitting,
    gini,
    measure,
    parity,
    token_faults,
)
from headspring.tokenization.parallel import PARALLEL
from headspring.tokenization.tokenizer import Tokenizer

REFERENCE_LANGUAGE = "English"
EXAMPLES = 8
# Prices need a model; without one, a small decoder of 6 layers.
DEFAULT_SHAPE = ModelShape(layers=6, width=256, heads=4, kv_heads=2, head_dim=64)


@dataclass(frozen=True)
class TokenizerReport:
    """Everything measured of one tokenizer. `examples`: spellings of some of the tokens at fault."""

    vocab_size: int
    kind: str
    corpora: dict[str, CorpusMeasures]
    parity: dict[str, Parity]
    gini: float
    digits: DigitSplitting
    faults: TokenFaults
    examples: dict[str, list[str]]
    costs: dict[str, Cost]


@dataclass(frozen=True)
class Comparison:
    """`tokenizers` by name. `shape` is what the prices were computed for."""

    tokenizers: dict[str, TokenizerReport]
    shape: ModelShape
    trailing_space: TrailingSpace | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON value; what could not be measured is null."""
        return _no_nan(asdict(self))

    def __rich__(self) -> Group:
        return Group(*_render(self))


def compare(
    tokenizers: Mapping[str, Tokenizer],
    corpora: Mapping[str, Sequence[str]],
    shape: ModelShape | None = None,
    training: Mapping[str, Iterable[str]] | None = None,
    trailing_space: TrailingSpace | None = None,
    parallel: Mapping[str, Sequence[str]] = PARALLEL,
) -> Comparison:
    """Measure each tokenizer on each corpus (name → texts).

    `training`: the texts a tokenizer was trained on, where known, to find tokens that never occur in them.
    `parallel`: language → sentences, the i-th of each saying the same; English among them.
    """
    shape = shape or DEFAULT_SHAPE
    training = training or {}
    reports = {name: _report(t, corpora, shape, training.get(name), parallel) for name, t in tokenizers.items()}
    return Comparison(reports, shape, trailing_space)


def _report(
    tokenizer: Tokenizer,
    corpora: Mapping[str, Sequence[str]],
    shape: ModelShape,
    training: Iterable[str] | None,
    parallel: Mapping[str, Sequence[str]],
) -> TokenizerReport:
    measures = {name: measure(tokenizer, texts) for name, texts in corpora.items()}
    faults = token_faults(tokenizer, training)
    examples = {
        name: [tokenizer.token(i) for i in sorted(ids, key=lambda i: -len(tokenizer.token(i)))[:EXAMPLES]]
        for name, ids in asdict(faults).items()
        if ids
    }
    fairness = {name: parity(tokenizer, lines, parallel[REFERENCE_LANGUAGE]) for name, lines in parallel.items()}
    return TokenizerReport(
        vocab_size=tokenizer.vocab_size,
        kind=tokenizer.kind,
        corpora=measures,
        parity=fairness,
        gini=gini([value.parity for value in fairness.values()]),
        digits=digit_splitting(tokenizer),
        faults=faults,
        examples=examples,
        costs={name: cost(tokenizer.vocab_size, m.characters, m.tokens, shape) for name, m in measures.items()},
    )


def _render(comparison: Comparison) -> list[Any]:
    reports = comparison.tokenizers
    first = next(iter(reports.values()))
    parts: list[Any] = []

    def table(title: str, rows: Iterable[tuple[str, list[str]]]) -> None:
        drawn = Table(title=Text(title, no_wrap=True), title_justify="left", box=None, padding=(0, 2, 0, 0))
        drawn.add_column("")
        for name in reports:
            drawn.add_column(Text(name, overflow="fold"), justify="right")
        for label, cells in rows:
            drawn.add_row(Text(label), *cells)
        parts.append(drawn)

    def corpora(field: str, form: str = ".2f", every: bool = False) -> list[tuple[str, list[str]]]:
        shown = [c for c in first.corpora if every or c not in PARALLEL or c == REFERENCE_LANGUAGE]  # JSON has them all
        return [(c, [_number(getattr(r.corpora[c], field), form) for r in reports.values()]) for c in shown]

    table("Vocabulary", _vocabulary_rows(reports))
    table("Bytes per token", corpora("bytes_per_token", every=True))
    table("Tokens per word", corpora("fertility"))
    table("Words cut in two or more", corpora("continued_words", ".0%"))
    table("Rényi efficiency (1: all alike)", corpora("renyi_efficiency", ".3f"))
    table("Vocabulary used", corpora("vocabulary_use", ".1%"))
    table("Tokens for the same content, English = 1", _parity_rows(reports, first))
    table("Numbers", _digit_rows(reports))
    table(f"Cost per 1,000 characters, {_describe(comparison.shape)}", _cost_rows(reports, first))
    if comparison.trailing_space is not None:
        parts.append(_trailing(comparison.trailing_space))
    return parts


def _vocabulary_rows(reports: Mapping[str, TokenizerReport]) -> list[tuple[str, list[str]]]:
    def faults(name: str) -> list[str]:
        found = [getattr(report.faults, name) for report in reports.values()]
        return ["not known" if ids is None else f"{len(ids):,}" for ids in found]

    return [
        ("kind", [report.kind for report in reports.values()]),
        ("tokens", [f"{report.vocab_size:,}" for report in reports.values()]),
        ("no UTF-8 of their own", faults("undecodable")),
        ("unreachable", faults("unreachable")),
        ("never in the training text", faults("never_trained")),
        ("such as", [" ".join((r.examples.get("never_trained") or [])[:2]) or "–" for r in reports.values()]),
    ]


def _parity_rows(reports: Mapping[str, TokenizerReport], first: TokenizerReport) -> list[tuple[str, list[str]]]:
    rows = [(language, [f"{r.parity[language].parity:.2f}" for r in reports.values()]) for language in first.parity]
    return [*rows, ("Gini (0: all pay the same)", [_number(r.gini, ".3f") for r in reports.values()])]


def _digit_rows(reports: Mapping[str, TokenizerReport]) -> list[tuple[str, list[str]]]:
    digits = [report.digits for report in reports.values()]
    rows = [(f"tokens of a {n}-digit number", [f"{d.mean_tokens[n]:.2f}" for d in digits]) for n in (1, 2, 3, 4, 6)]
    for name in ("left_aligned", "right_aligned", "both", "inconsistent"):
        label = "cut evenly either way" if name == "both" else name.replace("_", "-")
        rows.append((label, [f"{getattr(d, name):.0%}" for d in digits]))
    return rows


def _cost_rows(reports: Mapping[str, TokenizerReport], first: TokenizerReport) -> list[tuple[str, list[str]]]:
    names = list(first.costs)
    parameters = [f"{r.costs[names[0]].embedding_parameters:,}" for r in reports.values()]
    rows = [("embedding parameters", parameters)]
    for name in [n for n in ("prose", "code") if n in names] or names[:1]:
        costs = [report.costs[name] for report in reports.values()]
        rows.append((f"{name}: tokens", [_number(c.tokens, ".0f") for c in costs]))
        rows.append((f"{name}: attention MFLOPs", [_number(c.attention_flops / 1e6, ".1f") for c in costs]))
        rows.append((f"{name}: key–value cache KiB", [_number(c.kv_cache_bytes / 1024, ".1f") for c in costs]))
        context = [cost.context_characters for cost in costs if cost.context_characters is not None]
        if context:
            rows.append((f"{name}: characters in the context", [_number(length, ",.0f") for length in context]))
    return rows


def _trailing(space: TrailingSpace) -> Text:
    return Text(
        f"A space at the end of the prompt costs the model {space.drop:.2f} nats a continuation "
        f"({space.clean:.2f} → {space.spaced:.2f}, mean of {space.pairs}); it hurts in {space.hurt:.0%} of them; "
        f"token healing takes the space back in {space.healable:.0%}."
    )


def _describe(shape: ModelShape) -> str:
    return f"{shape.layers} layers, width {shape.width}, {shape.kv_heads} key–value heads of {shape.head_dim}"


def _number(value: float, form: str) -> str:
    return "–" if math.isnan(value) else format(value, form)


def _no_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _no_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_no_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
