"""The line's `quantize` stage: a model of the run in whole numbers, as a model folder of its own, and what that cost.

GPTQ calibrates on the training documents of the line's data, and both models are compared on its test documents, so that
nothing is measured on what it was fitted to. The original stays where it is; the manifest names it as the input.
"""

import heapq
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from headspring.artifacts.errors import UserError
from headspring.artifacts.value import Value
from headspring.data.store import read_documents
from headspring.inference.loading import read_model
from headspring.inference.quantization.calibration import token_rows
from headspring.inference.quantization.folder import is_quantized, save_quantized
from headspring.inference.quantization.reading import ACTIVATIONS, read
from headspring.inference.quantization.report import Baseline, report
from headspring.inference.quantization.scheme import Method, Quantization
from headspring.tokenization.tokenizer import Tokenizer

METRICS = ("bits", "bytes", "original_bytes", "bits_per_byte", "original_bits_per_byte", "kl", "same_best", "quantized", "kept")


class QuantizeConfig(Value):
    """`method`, `group` and `minimum` as in `Quantization`; `calibration` tokens of training text are what int4-gptq reads
    (16,384 where it is null), `held_out` tokens of test text what both models are measured on."""

    method: Method = "int8"
    group: Literal[32, 64, 128] | None = None
    minimum: bool = False
    calibration: int | None = Field(None, gt=0)
    held_out: int = Field(16_384, gt=1)

    @model_validator(mode="after")
    def _fits(self) -> "QuantizeConfig":
        if self.calibration is not None and self.method != "int4-gptq":
            raise ValueError(f"calibration is what int4-gptq reads; {self.method} rounds without any text")
        self.scheme()
        return self

    def scheme(self) -> Quantization:
        return Quantization(method=self.method, group=self.group, minimum=self.minimum)


def quantize_model(config: QuantizeConfig, model: Path, data: Path, folder: Path, seed: int) -> dict[str, Any]:
    """Write the model at `model` in whole numbers to `folder`, with its tokenizer; returns what changed. Nothing is random.

    Raises `UserError` for a model that is quantized already, or that does not continue text."""
    if is_quantized(model):
        raise UserError("this model is quantized already: choose the one it was made from with `from:`")
    tokenizer, original, notes = Tokenizer.load(model), read_model(model, None), list[str]()
    if original.config.counted or original.config.reads_source or not original.config.causal:
        raise UserError(
            f"a model of kind {original.config.kind!r} is not quantized here: bits per byte need a model of next tokens"
        )
    context, scheme = original.config.context, config.scheme()
    rows = None
    if config.method == "int4-gptq":
        wanted = config.calibration or scheme.tokens
        rows = token_rows(tokenizer, _texts(data, "train", wanted), wanted, context)
    quantized = read(model, None, scheme, lambda: tokenizer, rows, notes)
    held_out = token_rows(tokenizer, _texts(data, "test", config.held_out), config.held_out, context)
    baseline = Baseline(original.eval(), tokenizer, held_out, ACTIVATIONS)
    found = report(baseline, quantized.eval(), scheme.name).as_dict() | {"notes": notes}
    save_quantized(quantized, folder, found)
    tokenizer.save(folder)
    figures = {name: found[name] for name in METRICS} | {"held_out_tokens": found["tokens"]}
    return {
        "scheme": scheme.name,
        "parameters": original.num_parameters(),
        **figures,
        "notes": notes,
        "layers": found["layers"],
    }


def _texts(data: Path, split: str, tokens: int) -> Iterator[str]:
    """As many documents as `tokens` tokens can need, in the order of their ids, which are hashes: all sources in turn."""
    chosen = heapq.nsmallest(max(64, tokens // 16), read_documents(data, split=split), key=lambda document: document.id)
    return (document.text for document in chosen)
