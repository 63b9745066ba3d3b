"""The stages of the line: this file binds one function of each room to the names under which recipes know it.

Rooms are imported when their stage is looked up or runs, never before: `headspring run --help` loads none of them.
Raise a stage's `revision` when the same config and inputs begin to give another artifact.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from headspring.artifacts.value import Value
from headspring.line import estimates, memory
from headspring.line.evaluation_files import evaluation_texts
from headspring.line.fingerprint import sources_fingerprint
from headspring.line.registry import Context, Stage

GENERATED_TOKENS = 256  # of one synthetic text
MODELS = ("pretrain", "sft", "preference")


def _imported(module: str, name: str) -> Any:
    return getattr(import_module(f"headspring.{module}"), name)


def _config(module: str, name: str) -> Callable[[], type[Value]]:
    return lambda: _imported(module, name)


def _data(context: Context) -> dict[str, Any]:
    prepare = _imported("data.prepare", "prepare")
    texts = evaluation_texts(context.files)
    generate = _generate(context.generator, context.seed) if context.generator else None
    return prepare(context.config, context.folder, evaluation_texts=texts, generate=generate, seed=context.seed)


def _generate(path: Path, seed: int) -> Callable[[list[str]], list[str]]:
    """Texts that the model in `path` writes after prompts, sampled at temperature 1."""
    lm = _imported("inference.language_model", "LanguageModel").load(path)

    def generate(prompts: list[str]) -> list[str]:
        made = lm.generate(prompts, max_tokens=GENERATED_TOKENS, temperature=1.0, seed=seed)
        return [prompt + each.text for prompt, each in zip(prompts, made, strict=True)]

    return generate


def _tokenizer(context: Context) -> dict[str, Any]:
    documents = _imported("data.store", "read_documents")(context.inputs["data"], split="train")
    sizes: list[int] = []

    def texts():
        for document in documents:
            sizes.append(len(document.text.encode()))
            yield document.text

    tokenizer = _imported("tokenization.train", "train_tokenizer")(texts(), context.config)
    tokenizer.save(context.folder)
    return {"vocab_size": tokenizer.vocab_size, "documents": len(sizes), "bytes": sum(sizes)}


def _tokens(context: Context) -> dict[str, Any]:
    tokenizer = _imported("tokenization.tokenizer", "Tokenizer").load(context.inputs["tokenizer"])
    return _imported("data.shards", "write_tokens")(context.config, context.inputs["data"], tokenizer, context.folder)


def _on_inputs(module: str, name: str, *roles: str) -> Callable[[Context], dict[str, Any]]:
    """A stage whose function takes (config, one folder for each role, folder, seed)."""

    def run(context: Context) -> dict[str, Any]:
        folders: list[Path] = [context.inputs[role] for role in roles]
        return _imported(module, name)(context.config, *folders, context.folder, context.seed)

    return run


def _untrained(config: Any) -> Any:
    """An untrained model answers nothing: only its bits per byte and its samples say something."""
    left_out = {"tasks": None, "sets": (), "completions": 0, "functions": 0, "questions": (), "execute": False}
    return config.model_copy(update=left_out)


_STAGES = (
    Stage("data", 1, _config("data.prepare", "DataConfig"), _data, generates=True,
          reads_evaluation_files=True, fingerprint=sources_fingerprint, estimate=estimates.data),
    Stage("tokenizer", 1, _config("tokenization.train", "TokenizerConfig"), _tokenizer, {"data": ("data",)},
          estimate=estimates.by_bytes("tokenizer")),
    Stage("tokens", 1, _config("data.shards", "TokensConfig"), _tokens,
          {"data": ("data",), "tokenizer": ("tokenizer",)}, estimate=estimates.by_bytes("tokens")),
    Stage("pretrain", 1, _config("training.pretrain", "PretrainConfig"),
          _on_inputs("training.pretrain", "pretrain", "tokens", "tokenizer"),
          {"tokens": ("tokens",), "tokenizer": ("tokenizer",)}, training=True, model=True,
          estimate=estimates.pretrain, memory=memory.pretrain),
    Stage("sft", 2, _config("posttraining.sft", "SFTConfig"),
          _on_inputs("posttraining.sft", "sft", "model", "data", "tokens"),
          {"model": MODELS, "data": ("data",), "tokens": ("tokens",)}, training=True, model=True,
          estimate=estimates.sft, memory=memory.sft),
    Stage("preference", 1, _config("posttraining.preference", "PreferenceConfig"),
          _on_inputs("posttraining.preference", "dpo", "model", "data"),
          {"model": MODELS, "data": ("data",)}, training=True, model=True,
          estimate=estimates.preference, memory=memory.preference),
    Stage("contrastive", 1, _config("posttraining.contrastive", "ContrastiveConfig"),
          _on_inputs("posttraining.contrastive", "contrast", "model", "data"),
          {"model": MODELS, "data": ("data",)}, training=True,
          estimate=estimates.contrastive, memory=memory.contrastive),
    Stage("multimodal", 1, _config("posttraining.multimodal", "MultimodalConfig"),
          _on_inputs("posttraining.multimodal", "teach", "model"), {"model": MODELS}, training=True,
          estimate=estimates.multimodal, memory=memory.multimodal),
    Stage("quantize", 1, _config("inference.quantization.stage", "QuantizeConfig"),
          _on_inputs("inference.quantization.stage", "quantize_model", "model", "data"),
          {"model": MODELS, "data": ("data",)}, model=True, estimate=estimates.quantize),
    Stage("baselines", 1, _config("evaluation.baselines", "BaselinesConfig"),
          _on_inputs("evaluation.baselines", "baselines", "data", "tokens"),
          {"data": ("data",), "tokens": ("tokens",)}, held_out=lambda config: config.held_out,
          estimate=estimates.by_bytes("baselines")),
    Stage("evaluate", 1, _config("evaluation.evaluate", "EvaluateConfig"),
          _on_inputs("evaluation.evaluate", "evaluate", "model", "data"),
          {"model": (*MODELS, "quantize"), "data": ("data",)}, each_model=True,
          files=lambda config: config.sets, held_out=lambda config: config.held_out, before_training=_untrained,
          estimate=estimates.evaluate),
)  # fmt: skip

STAGES: Mapping[str, Stage] = {stage.kind: stage for stage in _STAGES}
