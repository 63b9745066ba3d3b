"""What each stage is expected to cost, for `--dry-run`.

Pretraining is measured: a step of the model itself, here and now; other work of a model costs in proportion to its
tokens. Stages without a model go at the rates below, measured on one core of a 2020s server. Read the sum as right to
within a factor of two. What is known of a stage that has run in this folder is preferred to all of this (`plan.py`).
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from headspring.artifacts.errors import UserError
from headspring.line.fingerprint import files
from headspring.line.registry import Estimate, Known

BYTES_PER_SECOND = {"data": 1.2e6, "tokenizer": 3.0e6, "tokens": 2.5e6, "baselines": 0.35e6}
BYTES_PER_TOKEN = 3.3
FORWARD = 1 / 3  # of the time of a training step; the backward pass is the rest
PAIR_TOKENS = 256  # of a preference pair: two short conversations
SECONDS_PER_ANSWER = 0.04  # of one short answer in a batch


def data(config: Any, known: Known) -> Estimate:
    """By the bytes of the local files it will read; open where a source is remote or made up."""
    sizes = [_source_bytes(source) for source in config.sources.values()]
    if any(size is None for size in sizes):
        return Estimate()
    total = float(sum(size for size in sizes if size is not None))
    return Estimate(total / BYTES_PER_SECOND["data"], bytes=total)


def _source_bytes(source: Any) -> float | None:
    if source.kind == "files":
        found = {path for pattern in source.paths if "://" not in pattern for path in files(pattern)}
        remote = any("://" in pattern for pattern in source.paths)
        return None if remote else float(sum(Path(path).stat().st_size for path in found if Path(path).is_file()))
    if source.kind in ("stdlib", "topics"):
        return float(sum(path.stat().st_size for path in _python("stdlib"))) if source.kind == "stdlib" else 0.7e6
    if source.kind == "docstrings" and source.max_bytes is not None:
        sizes = [sum(path.stat().st_size for path in _python(package)) for package in source.packages]
        return float(sum(min(source.max_bytes, size) for size in sizes))
    return None


def _python(package: str) -> list[Path]:
    try:
        return [path for path, _ in import_module("headspring.text.sources.python").python_files(package)]
    except UserError:
        return []  # the data stage will say so


def by_bytes(kind: str) -> Any:
    """Proportional to the bytes of text, known or expected."""

    def estimate(config: Any, known: Known) -> Estimate:
        if known.bytes is None:
            return Estimate()
        tokens = known.bytes / BYTES_PER_TOKEN if kind == "tokens" else None
        return Estimate(known.bytes / BYTES_PER_SECOND[kind], tokens, bytes=known.bytes)

    return estimate


def pretrain(config: Any, known: Known) -> Estimate:
    """A few steps of the model, timed; parameters, tokens and FLOPs follow from the config."""
    vocab_size = known.configs["tokenizer"].vocab_size
    figures = import_module("headspring.training.pretrain").plan(config, vocab_size)
    cost = {name: float(figures[name]) for name in ("seconds", "tokens", "parameters", "flops")}
    samples = config.steps * config.batch_size
    return Estimate(**cost, sample_tokens=cost["tokens"] / samples, seconds_per_token=cost["seconds"] / cost["tokens"])


def sft(config: Any, known: Known) -> Estimate:
    """As much a token as the model it starts from took. Open where the length is said in epochs."""
    length = config.sequence_length or known.estimates["model"].sample_tokens
    if config.epochs is not None or length is None:
        return _training(None, known)
    return _training(float(config.steps * config.batch_size * length), known)


def preference(config: Any, known: Known) -> Estimate:
    """Sampling the answers, the reference's log-probabilities, and training on the pairs."""
    trained = _training(float(config.steps * config.batch_size * PAIR_TOKENS), known)
    if trained.seconds is None:
        return trained
    answers = config.tasks.per_kind * len(config.tasks.kinds) * config.num_answers
    return trained.with_seconds((1 + FORWARD) * trained.seconds + SECONDS_PER_ANSWER * answers)


def contrastive(config: Any, known: Known) -> Estimate:
    """Training on the pairs, at most as long as they are cut."""
    tokens = config.pairs.query_tokens + config.pairs.passage_tokens
    return _training(float(config.steps * config.batch_size * tokens), known)


def multimodal(config: Any, known: Known) -> Estimate:
    """Training on questions, and answering those about held-out items three times."""
    trained = _training(float(config.steps * config.batch_size * config.expected_tokens()), known)
    if trained.seconds is None:
        return trained
    return trained.with_seconds(trained.seconds + 3 * SECONDS_PER_ANSWER * config.validation_questions)


def quantize(config: Any, known: Known) -> Estimate:
    """Both models over the held-out tokens, and with GPTQ the original twice over those of the calibration."""
    model = known.estimates["model"]
    if model.seconds_per_token is None:
        return Estimate(parameters=model.parameters)
    calibration = 2 * (config.calibration or config.scheme().tokens) if config.method == "int4-gptq" else 0
    tokens = 2 * config.held_out + calibration
    return Estimate(FORWARD * model.seconds_per_token * tokens).inheriting(model)


def evaluate(config: Any, known: Known) -> Estimate:
    """One forward pass over the held-out bytes, windows overlapping by half, and the answers."""
    rate = known.estimates["model"].seconds_per_token
    if rate is None:
        return Estimate()
    held_out = min(config.held_out.max_bytes or float("inf"), known.bytes or 0.0) if config.held_out else 0.0
    answers = len(config.tasks.kinds) * config.tasks.per_kind if config.tasks else 0
    answers += config.completions + config.functions
    return Estimate(2 * FORWARD * rate * held_out / BYTES_PER_TOKEN + SECONDS_PER_ANSWER * answers)


def _training(tokens: float | None, known: Known) -> Estimate:
    """Training the given model on `tokens`, at what a token cost it before."""
    model = known.estimates["model"]
    if tokens is None:
        return Estimate()
    rate, flops = model.seconds_per_token, model.flops / model.tokens if model.flops and model.tokens else None
    return Estimate(
        seconds=rate * tokens if rate is not None else None,
        tokens=tokens,
        flops=flops * tokens if flops is not None else None,
    )
