"""A model's own answers to tasks, and whether the rule calls them right.

An answer is right when it stopped by itself and `check_answer` accepts its text. One that ran into the length limit is
wrong whatever it says: a model that does not stop has not answered. Sampled token ids are kept as they were sampled;
nothing is encoded again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from headspring.data.tasks import Task, check_answer


class Answerer(Protocol):
    """What this module needs of `inference.LanguageModel`."""

    tokenizer: Any

    def generate(self, prompts: list[list[int]], **sampling: Any) -> list[Any]: ...


@dataclass(frozen=True)
class Answer:
    """One sampled answer. `token_ids` end with the stop token where the model stopped."""

    token_ids: tuple[int, ...]
    text: str
    stopped: bool
    right: bool


def prompt_ids(tokenizer: Any, task: Task) -> list[int]:
    """The ids that ask for the assistant's answer: a prefix of the ids the task's conversation is trained with."""
    return [int(token) for token in tokenizer.render(task.messages, add_generation_prompt=True).ids]


def answer(
    lm: Answerer, tasks: Sequence[Task], num_answers: int, max_tokens: int, temperature: float, seed: int
) -> list[list[Answer]]:
    """`num_answers` answers to each task, in the tasks' order. Temperature 0 is greedy."""
    prompts = [prompt_ids(lm.tokenizer, task) for task in tasks]
    options = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "n": num_answers}
    generations = lm.generate(prompts, stop_token_ids=(lm.tokenizer.end_id,), **options) if prompts else []
    assert len(generations) == num_answers * len(tasks)
    rows = [generations[start : start + num_answers] for start in range(0, len(generations), num_answers)]
    return [[_judge(task, generation) for generation in row] for task, row in zip(tasks, rows)]


def _judge(task: Task, generation: Any) -> Answer:
    stopped = generation.finish_reason == "stop"
    right = stopped and check_answer(task, generation.text)
    return Answer(tuple(generation.token_ids), generation.text, stopped, right)
