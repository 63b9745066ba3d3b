"""What a stage came to, in at most two short lines: the words in its box of the picture.

Every line is read from the stage's own metrics; what a stage did not record is left out.
"""

from headspring.line.report import formats
from headspring.line.report.reading import StageView, lookup, number


def outcome(stage: StageView) -> list[str]:
    """Up to two lines of at most about 24 characters."""
    if not stage.manifest:
        return ["not run"]
    lines = _LINES.get(stage.kind, lambda stage: [])(stage)
    return [line for line in lines if line][:2]


def _say(stage: StageView, template: str, form, *paths: str) -> str:
    value = number(lookup(stage.metrics, *paths))
    return "" if value is None else template.format(form(value))


def _data(stage: StageView) -> list[str]:
    return [
        _say(stage, "{} documents", formats.count, "documents_kept", "kept.documents", "documents"),
        _say(stage, "{} of text", formats.byte_count, "bytes_kept", "kept.bytes", "bytes"),
    ]


def _tokenizer(stage: StageView) -> list[str]:
    return [
        _say(stage, "{} tokens", formats.count, "vocab_size"),
        _say(stage, "{} bytes a token", lambda value: f"{value:.2f}", "bytes_per_token"),
    ]


def _tokens(stage: StageView) -> list[str]:
    return [
        _say(stage, "{} tokens", formats.count, "tokens.train", "train_tokens", "tokens"),
        _say(stage, "{} bytes a token", lambda value: f"{value:.2f}", "bytes_per_token"),
    ]


def _trained(stage: StageView) -> list[str]:
    return [
        _say(stage, "{} parameters", formats.count, "parameters"),
        _say(stage, "{} tokens seen", formats.count, "tokens", "trained_tokens")
        or _say(stage, "{} pairs", formats.count, "pairs")
        or _say(stage, "{} steps", formats.count, "steps"),
    ]


def _quantized(stage: StageView) -> list[str]:
    return [
        _say(stage, "{}", formats.byte_count, "bytes") + _say(stage, " of {}", formats.byte_count, "original_bytes"),
        _say(stage, "KL {} nats", lambda value: f"{value:.4f}", "kl"),
    ]


def _evaluate(stage: StageView) -> list[str]:
    return [
        _say(stage, "{} bits per byte", formats.plain, "bits_per_byte.all"),
        _say(stage, "{} tasks right", formats.percent, "task_accuracy.rate"),
    ]


def _baselines(stage: StageView) -> list[str]:
    return [
        _say(stage, "n-gram {} bits/B", formats.plain, *(f"kneser_ney_{n}gram.all" for n in range(1, 9))),
        _say(stage, "xz {} bits/B", formats.plain, "xz.all"),
    ]


_LINES = {
    "data": _data,
    "tokenizer": _tokenizer,
    "tokens": _tokens,
    "pretrain": _trained,
    "sft": _trained,
    "preference": _trained,
    "contrastive": _trained,
    "multimodal": _trained,
    "quantize": _quantized,
    "evaluate": _evaluate,
    "baselines": _baselines,
}
