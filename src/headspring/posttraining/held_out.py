"""The tasks of a post-training stage: to train on from the training split, to measure on from the validation split.

A function that also stands in a validation or test document (a copy in another file) is never trained on, so that a
gain on held-out functions cannot be memory.
"""

from pathlib import Path

from headspring.artifacts import UserError
from headspring.data.store import read_documents
from headspring.data.tasks import Task, TaskConfig, fingerprints, mine


def split_tasks(config: TaskConfig, data_folder: Path, seed: int, held_out_per_kind: int) -> tuple[list[Task], list[Task]]:
    """Training tasks, and at most `held_out_per_kind` validation tasks of each kind (the same ones for every seed).

    Raises `UserError` where either split has none."""
    validation = list(read_documents(data_folder, split="validation"))
    exclude = fingerprints(validation, config) | fingerprints(read_documents(data_folder, split="test"), config)
    held_out_config = config.model_copy(update={"per_kind": held_out_per_kind, "per_function": 2})
    return (
        _mine("training", list(read_documents(data_folder, split="train")), config, seed, exclude),
        _mine("validation", validation, held_out_config, 0, set()),
    )


def _mine(split: str, documents: list, config: TaskConfig, seed: int, exclude: set[str]) -> list[Task]:
    try:
        return mine(documents, config, seed, exclude)
    except UserError as error:
        raise UserError(f"the {split} split has {len(documents)} documents, but {error}") from error
