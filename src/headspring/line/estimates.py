"""What each stage is expected to cost, for `--dry-run`.

Pretraining is measured: a step of the model itself, here and now. Fine-tuning costs as much a token. The others are
taken to be proportional to the bytes of text, at the rate of one core of a 2020s server; they say how long the line
takes to within a factor of two, no better. Preferences sample their own pairs, which nothing here predicts.
"""

from importlib import import_module
from typing import Any

from headspring.line.registry import Estimate, Known

BYTES_PER_SECOND = {"tokenizer": 2.5e6, "tokens": 2.0e6, "baselines": 0.5e6}


def pretrain(config: Any, known: Known) -> Estimate:
    """A few steps of the model, timed; parameters, tokens and FLOPs follow from the config."""
    vocab_size = known.configs["tokenizer"].vocab_size
    figures = import_module("headspring.training.pretrain").plan(config, vocab_size)
    cost = {name: float(figures[name]) for name in ("seconds", "tokens", "parameters", "flops")}
    return Estimate(**cost, sample_tokens=cost["tokens"] / (config.steps * config.batch_size))


def sft(config: Any, known: Known) -> Estimate:
    """As much a token as the model it starts from took. Open where the length is said in epochs."""
    model = known.estimates["model"]
    length = config.sequence_length or model.sample_tokens
    if config.epochs is not None or length is None:
        return Estimate(parameters=model.parameters, sample_tokens=length)
    tokens = float(config.steps * config.batch_size * length)
    scale = tokens / model.tokens if model.tokens else None
    return Estimate(
        seconds=scale * model.seconds if scale is not None and model.seconds is not None else None,
        tokens=tokens,
        parameters=model.parameters,
        flops=scale * model.flops if scale is not None and model.flops is not None else None,
        sample_tokens=length,
    )


def preference(config: Any, known: Known) -> Estimate:
    """Its parameters; what sampling the pairs takes depends on how the model answers."""
    model = known.estimates["model"]
    return Estimate(parameters=model.parameters, sample_tokens=model.sample_tokens)


def by_bytes(kind: str) -> Any:
    """Proportional to the bytes that the data stage kept, where it has run."""

    def estimate(config: Any, known: Known) -> Estimate:
        return Estimate(known.data_bytes / BYTES_PER_SECOND[kind] if known.data_bytes is not None else None)

    return estimate
