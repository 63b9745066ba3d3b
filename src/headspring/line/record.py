"""`RUN/run.json`: which recipe filled this folder, in which order, and how far it got.

schema_version, recipe (name), description, recipe_file, seed
stages   names in the order in which they run
kinds    stage → kind
inputs   stage → {role: stage}, or `stage/part` where a part of its folder is meant
configs  stage → resolved config
states   stage → "pending" | "running" | "done" | "failed" | "interrupted" | "outdated" (an input changed since)
state    the same of the whole: "running" | "done" | "failed" | "interrupted" | "partial" (stopped by --until)
updated  seconds since 1970
"""

import time
from pathlib import Path
from typing import Any

from headspring.artifacts.errors import UserError
from headspring.artifacts.files import read_json, write_json
from headspring.line.recipe import Recipe

SCHEMA_VERSION = 1
FILE = "run.json"


def new_record(recipe: Recipe) -> dict[str, Any]:
    """The record of a run that has done nothing yet."""
    return {
        "schema_version": SCHEMA_VERSION,
        "recipe": recipe.name,
        "description": recipe.description,
        "recipe_file": str(recipe.path),
        "seed": recipe.seed,
        "stages": [step.name for step in recipe.steps],
        "kinds": {step.name: step.stage.kind for step in recipe.steps},
        "inputs": {step.name: {role: str(source) for role, source in step.inputs.items()} for step in recipe.steps},
        "configs": {step.name: step.config.model_dump(mode="json") for step in recipe.steps},
        "states": {step.name: "pending" for step in recipe.steps},
        "state": "running",
        "updated": time.time(),
    }


def write_record(folder: Path, record: dict[str, Any]) -> None:
    write_json(folder / FILE, {**record, "updated": time.time()})


def read_record(folder: Path) -> dict[str, Any] | None:
    """The folder's record, or None. Raises `UserError` for another schema version and for what is no record."""
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        record = read_json(path)
        version = record["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a run's record; give another --run-dir") from error
    if version != SCHEMA_VERSION:
        raise UserError(f"{path}: written by another version (schema {version}, here {SCHEMA_VERSION}); give another --run-dir")
    return record


def check_folder(folder: Path, recipe: Recipe) -> None:
    """Refuse a folder that another recipe, another version or something else altogether filled."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: not a folder; give another --run-dir")
    record = read_record(folder)
    if record is not None and record.get("recipe") != recipe.name:
        raise UserError(
            f"{folder}: holds a run of the recipe {record.get('recipe')!r}, not {recipe.name!r}; give another --run-dir"
        )
    if record is None and folder.is_dir() and any(not file.name.startswith(".") for file in folder.iterdir()):
        raise UserError(f"{folder}: not empty and not a run (it has no {FILE}); give another --run-dir")
