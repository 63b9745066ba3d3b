"""Measure one model on held-out documents: compression, tasks, doctests by execution, code that parses, samples.

The same documents, tasks, headers and prompts for every model of a run, so that stages can be compared pair by pair:
nothing here depends on the model but the answers. `tasks.jsonl` keeps every answer (`tasks.paired_difference`).
"""

import warnings
from collections.abc import Sequence
from math import exp2
from pathlib import Path
from typing import Any

from pydantic import Field

from headspring.artifacts import UserError, Value
from headspring.artifacts.files import write_json
from headspring.artifacts.sandbox import isolation
from headspring.data.store import read_documents
from headspring.data.tasks import Task, TaskConfig, mine
from headspring.evaluation import completions, execution
from headspring.evaluation.compression import Precision, compute_dtype, score_documents
from headspring.evaluation.held_out import HeldOut, by_source, fingerprint, held_out, num_bytes
from headspring.evaluation.tasks import Answer, answer_tasks, chat_prompt, read_set, write_answers
from headspring.inference.language_model import LanguageModel
from headspring.posttraining.rates import rate
from headspring.text.chat import Message
from headspring.text.documents import Document

SAMPLES = ("def read_lines(path):", "class", "import", "The")  # no space at the end: it would be half a token
QUESTIONS = ("def area(width, height=2):\n    return width * height\n\nWhich parameters does this function take?",)


class EvaluateConfig(Value):
    """What to measure. A number of 0, an empty list or `tasks: null` leaves a part out.

    held_out: documents for bits per byte; `stride` in tokens (null: half a context). tasks: mined from the test split.
    sets: JSONL files of prompts and answers. completions: function headers for the parse rate. functions: held-out
    functions with doctests to complete and run; execute: run those and doctest answers. samples are continued at
    temperature 0.7, as greedy text of a small model repeats itself; questions are answered greedily, as a chat.
    max_tokens: of one answer, completion or sample. precision: of the activations ("auto": the model's own).
    unsafe_execution: run programs even where nothing isolates them."""

    held_out: HeldOut | None = HeldOut()
    stride: int | None = Field(default=None, gt=0)
    precision: Precision = "bf16"
    batch_tokens: int = Field(default=8192, gt=0)
    batch_size: int = Field(default=64, gt=0)
    tasks: TaskConfig | None = TaskConfig(per_kind=40)
    sets: tuple[str, ...] = ()
    execute: bool = True
    completions: int = Field(default=48, ge=0)
    functions: int = Field(default=16, ge=0)
    samples: tuple[str, ...] = SAMPLES
    questions: tuple[str, ...] = QUESTIONS
    max_tokens: int = Field(default=64, gt=0)
    unsafe_execution: bool = False


def evaluate(config: EvaluateConfig, model_folder: Path, data_folder: Path, folder: Path, seed: int = 0) -> dict[str, Any]:
    """The metrics of the model at `model_folder` on the data stage at `data_folder`; see `measure`.

    Writes `folder/evaluation.json` and `folder/tasks.jsonl`. `seed` chooses the tasks and headers."""
    metrics, answers = measure(LanguageModel.load(model_folder), config, data_folder, seed)
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_answers(answers, folder)
    write_json(Path(folder) / "evaluation.json", metrics)
    return metrics


def measure(
    lm: LanguageModel, config: EvaluateConfig, data_folder: Path | None, seed: int = 0
) -> tuple[dict[str, Any], list[Answer]]:
    """(metrics, every answer). `data_folder` None measures only what needs no documents: sets, samples, questions.

    - bits_per_byte: {"all": x, source: y}; held_out: {"documents", "bytes", "fingerprint"}
    - tasks: {kind: {"rate", "low", "high", "n"}}; task_accuracy: the same over all of them (Wilson intervals)
    - doctest_pass_rate: outputs that a run of the expression confirms; function_pass_rate: completed functions that
      pass their doctests; parse_rate: completed functions that parse (with "undecided" samples, which do not count)
    - samples: [{"prompt", "text"}]"""
    lm.require_causal()
    metrics: dict[str, Any] = {}
    tasks = [task for path in config.sets for task in read_set(path)]
    with compute_dtype(lm.model, config.precision):
        if data_folder is not None:
            if config.held_out is not None:
                metrics |= _compression(lm, config, data_folder)
            split = config.held_out.split if config.held_out else "test"
            documents = list(read_documents(data_folder, split=split))
            tasks = _mine(documents, config.tasks, seed) + tasks
            metrics |= _completions(lm, config, documents, seed)
            metrics |= _functions(lm, config, documents)
        answers = answer_tasks(lm, tasks, config.max_tokens, config.batch_size, config.batch_tokens)
        metrics |= _rates(answers) | _doctests(config, tasks, answers)
        metrics |= _samples(lm, config, seed)
    return metrics, answers


def _compression(lm: LanguageModel, config: EvaluateConfig, data_folder: Path) -> dict[str, Any]:
    assert config.held_out is not None
    return compression(lm, held_out(data_folder, config.held_out), config)


def compression(lm: LanguageModel, documents: Sequence[Document], config: EvaluateConfig) -> dict[str, Any]:
    """Bits per byte, in all and by source, and perplexity (2^bits per token, which depends on the tokenizer)."""
    scores = score_documents(lm, documents, config.stride, config.batch_tokens, config.precision)
    bits = [score.bits for score in scores]
    perplexity = exp2(sum(bits) / sum(score.num_tokens for score in scores))
    about = {
        "documents": len(documents),
        "bytes": sum(map(num_bytes, documents)),
        "fingerprint": fingerprint(documents),
    }
    return {"bits_per_byte": by_source(documents, bits), "perplexity": perplexity, "held_out": about}


def _mine(documents: Sequence[Document], config: TaskConfig | None, seed: int) -> list[Task]:
    """The tasks of the documents; none where they hold none (prose in another language, say)."""
    if config is None or not documents:
        return []
    try:
        return mine(documents, config, seed)
    except UserError as error:
        if not config.kinds:
            raise
        warnings.warn(f"evaluation without mined tasks: {error}", stacklevel=2)
        return []


def _rates(answers: Sequence[Answer]) -> dict[str, Any]:
    """Accuracy by kind and over all. Prompts longer than the context were never asked and are counted apart."""
    decided = [answer for answer in answers if answer.correct is not None]
    if not decided:
        return {}
    kinds = {kind: [bool(a.correct) for a in decided if a.kind == kind] for kind in sorted({a.kind for a in decided})}
    too_long = len(answers) - len(decided)
    return {
        "tasks": {kind: rate(right) for kind, right in kinds.items()},
        "task_accuracy": {**rate([right for rights in kinds.values() for right in rights]), "too_long": too_long},
    }


def _doctests(config: EvaluateConfig, tasks: Sequence[Task], answers: Sequence[Answer]) -> dict[str, Any]:
    pairs = [(task, answer) for task, answer in zip(tasks, answers) if task.check == "doctest"]
    chosen = [(task, answer) for task, answer in pairs if answer.correct is not None]
    if not config.execute or not chosen:
        return {}
    asked, said = [task for task, _ in chosen], [answer.answer for _, answer in chosen]
    passed = execution.outputs_pass(asked, said, config.unsafe_execution)
    decided = [result for result in passed if result is not None]
    wrong = len(passed) - len(decided)
    return {"doctest_pass_rate": {**rate(decided), "wrong_documentation": wrong, "isolation": isolation() or "none"}}


def _completions(lm: LanguageModel, config: EvaluateConfig, documents: Sequence[Document], seed: int) -> dict[str, Any]:
    headers = completions.headers(documents, config.completions, seed)
    if not headers:
        return {}
    texts = completions.complete(lm, [header.prompt for header in headers], config.max_tokens, config.batch_size)
    bodies = [completions.body_of(text, header.line, finished) for header, (text, finished) in zip(headers, texts)]
    judged = [completions.parses(header.line, body) for header, body in zip(headers, bodies) if body is not None]
    return {"parse_rate": {**rate(judged), "undecided": len(bodies) - len(judged)}}


def _functions(lm: LanguageModel, config: EvaluateConfig, documents: Sequence[Document]) -> dict[str, Any]:
    if not config.execute or not config.functions:
        return {}
    functions = execution.documented_functions(documents, config.functions, unsafe=config.unsafe_execution)
    if not functions:
        return {}
    texts = completions.complete(lm, [function.prompt for function in functions], config.max_tokens, config.batch_size)
    lines = [f"{function.indent}def f():" for function in functions]
    bodies = [completions.body_of(text, line, finished) or "" for line, (text, finished) in zip(lines, texts)]
    return {"function_pass_rate": rate(execution.functions_pass(functions, bodies, config.unsafe_execution))}


def _samples(lm: LanguageModel, config: EvaluateConfig, seed: int) -> dict[str, Any]:
    options: dict[str, Any] = {"max_tokens": config.max_tokens, "progress": "samples"}
    found = []
    if config.samples:
        texts = lm.generate(list(config.samples), temperature=0.7, top_p=0.95, seed=seed, **options)
        found += [{"prompt": prompt, "text": text.text} for prompt, text in zip(config.samples, texts)]
    if config.questions:
        prompts = [chat_prompt(lm, [Message(role="user", content=question)]) for question in config.questions]
        texts = lm.generate(prompts, temperature=0.0, **options)
        found += [{"prompt": question, "text": text.text} for question, text in zip(config.questions, texts)]
    return {"samples": found} if found else {}
