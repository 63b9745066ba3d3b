"""A recipe: the stages of a line, in order, with their configs.

Three keys at the top are the recipe's own (`recipe`, `description`, `seed`); every other key is a stage. Its kind is its
name up to the first `-` (`sft`, `sft-short`; `dpo` is of kind `preference`), or what its `kind:` says. Each input is
filled by the nearest stage above that can fill it, or by the one that `from:` names. `evaluate` stands for one
evaluation of every model stage above it, so that a change of `sft` repeats no evaluation of `pretrain`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headspring.artifacts.errors import UserError
from headspring.line.registry import Registry, Stage
from headspring.line.source import Route, Source, read_source
from headspring.line.validate import nearest, validate

RESERVED = ("recipe", "description", "seed")
KIND_OF_NAME = {"dpo": "preference"}
INITIAL = "initial"  # a pretraining's model before its first step, in this folder of its artifact
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


@dataclass(frozen=True)
class Input:
    """The artifact of stage `step`, or the folder `part` of it."""

    step: str
    part: str = ""

    def __str__(self) -> str:
        return f"{self.step}/{self.part}" if self.part else self.step


@dataclass(frozen=True)
class Step:
    """One stage of one recipe. `group` is the recipe's key it came from (`evaluate` for `evaluate-sft`)."""

    name: str
    group: str
    stage: Stage
    config: Any
    inputs: Mapping[str, Input]
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """A validated recipe. `steps` are in the order in which they run."""

    name: str
    description: str
    seed: int
    path: Path
    steps: tuple[Step, ...] = field(repr=False)

    def step(self, name: str) -> Step:
        return next(step for step in self.steps if step.name == name)

    def select(self, name: str, option: str) -> list[str]:
        """The steps called `name`, or that came from the recipe's key `name`. `UserError` where there are none."""
        found = [step.name for step in self.steps if name in (step.name, step.group)]
        if not found:
            names = [step.name for step in self.steps]
            raise UserError(f"{option} {name}: the recipe {self.name!r} has no such stage{nearest(name, names)}")
        return found

    def following(self, names: Sequence[str]) -> set[str]:
        """`names` and every step that depends on one of them."""
        found = set(names)
        for step in self.steps:
            if any(source.step in found for source in step.inputs.values()):
                found.add(step.name)
        return found

    @property
    def models(self) -> list[str]:
        """The stages that write a model, in order."""
        return [step.name for step in self.steps if step.stage.model]


def find_recipe(recipe: str | Path) -> Path:
    """The file of a recipe: a path, or the bare name of one in `recipes/`."""
    path = Path(recipe).expanduser()
    if path.is_file():
        return path
    folders = [Path("recipes"), Path(__file__).parents[3] / "recipes"]
    for folder in folders:
        if path.parent == Path() and (folder / f"{path.name}.yaml").is_file():
            return folder / f"{path.name}.yaml"
    known = {file.stem for folder in folders for file in folder.glob("*.yaml")}
    raise UserError(f"{recipe}: no such recipe{nearest(path.stem, known)}")


def load_recipe(
    recipe: str | Path, overrides: Sequence[str] | Mapping[str, Any] = (), registry: Registry | None = None
) -> Recipe:
    """Read, override and validate. `overrides`: `key=value` texts, or a mapping from dotted keys to values.

    Raises `UserError` for everything that is wrong with the file or the overrides, with the place.
    """
    if registry is None:
        from headspring.line.stages import STAGES as registry  # noqa: N811
    path = find_recipe(recipe)
    source = read_source(path)
    names = [*source.tree]
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            _known(key, names)
            source.override(key, value, parse=False)
    else:
        for text in overrides:
            if "=" in text:
                _known(text.partition("=")[0], names, text)
            source.override(text)
    return _Builder(source, registry).build(path)


def _known(key: str, names: Sequence[str], text: str = "") -> None:
    first = key.partition(".")[0]
    if first not in names and first not in RESERVED:
        raise UserError(f"override {text or key!r}: the recipe has no stage {first!r}{nearest(first, names)}")


class _Builder:
    """The steps so far; each new one finds its inputs among them."""

    def __init__(self, source: Source, registry: Registry):
        self.source, self.registry, self.steps = source, registry, list[Step]()

    def build(self, path: Path) -> Recipe:
        tree = self.source.tree
        header = {"recipe": path.stem, "description": "", "seed": 0}
        header |= {key: tree[key] for key in RESERVED if tree.get(key) is not None}
        for key, expected in (("recipe", str), ("description", str), ("seed", int)):
            if type(header[key]) is not expected:
                raise self.source.error((key,), f"must be {'a word' if expected is str else 'an integer'}")
        if not _NAME.fullmatch(header["recipe"].lower()):
            raise self.source.error(("recipe",), "a recipe's name is made of letters, digits, '-' and '_'")
        if not 0 <= header["seed"] < 2**31:
            raise self.source.error(("seed",), "must lie between 0 and 2147483647")
        for name, values in tree.items():
            if name not in RESERVED:
                self.add(name, values)
        if not self.steps:
            raise self.source.error((), "the recipe lists no stages")
        return Recipe(header["recipe"], header["description"], header["seed"], path, tuple(self._with_evaluation_files()))

    def add(self, name: str, values: Any) -> None:
        route: Route = (name,)
        if not _NAME.fullmatch(name):
            raise self.source.error(route, "a stage's name is made of small letters, digits, '-' and '_'")
        if not isinstance(values, dict | None):
            raise self.source.error(route, f"a stage is a mapping of its keys, not {values!r}")
        values = dict(values or {})
        stage = self._stage(name, values)
        chosen = self._from(route, values.pop("from", None))
        config = validate(stage.config(), values, route, self.source)
        files = tuple(Path(file).expanduser() for file in stage.files(config))
        for file in files:
            if not file.is_file():
                raise self.source.error(route, f"no such file: {file}")
        if stage.each_model:
            self._add_each_model(name, stage, config, chosen, files)
        else:
            self._append(Step(name, name, stage, config, self._inputs(route, stage, chosen), files))

    def _add_each_model(self, name: str, stage: Stage, config: Any, chosen: list[Step], files: tuple[Path, ...]) -> None:
        models = [step for step in chosen or self.steps if step.stage.model]
        if not models:
            raise self.source.error((name,), "there is no model stage above to evaluate")
        pretrained = [step for step in models if step.stage.kind == "pretrain"]
        others = self._inputs((name,), stage, [], skip="model")
        if stage.before_training:
            for step in pretrained:
                suffix = INITIAL if len(pretrained) == 1 else f"{step.name}-{INITIAL}"
                inputs = {"model": Input(step.name, INITIAL), **others}
                self._append(Step(f"{name}-{suffix}", name, stage, stage.before_training(config), inputs, files))
        for step in models:
            self._append(Step(f"{name}-{step.name}", name, stage, config, {"model": Input(step.name), **others}, files))

    def _append(self, step: Step) -> None:
        if any(step.name == other.name for other in self.steps):
            raise self.source.error((step.group,), f"two stages would be called {step.name!r}")
        self.steps.append(step)

    def _stage(self, name: str, values: dict[str, Any]) -> Stage:
        """The stage's kind. A `kind` that is no stage's kind belongs to the config (`tokenizer: {kind: unigram}`)."""
        word = name.partition("-")[0]
        guess = KIND_OF_NAME.get(word, word)
        said = values.get("kind")
        if isinstance(said, str) and said in self.registry:
            return self.registry[values.pop("kind")]
        if guess in self.registry:
            return self.registry[guess]
        if said is not None:
            raise self.source.error((name, "kind"), f"unknown kind {said!r}{nearest(str(said), self.registry)}")
        names = {*self.registry, *KIND_OF_NAME} - {*KIND_OF_NAME.values()}
        raise self.source.error((name,), f"unknown stage{nearest(name, names)} (any other name needs a `kind:`)")

    def _from(self, route: Route, names: Any) -> list[Step]:
        chosen = []
        for name in [names] if isinstance(names, str) else names or []:
            found = [step for step in self.steps if step.name == name]
            if not found:
                above = [step.name for step in self.steps]
                raise self.source.error((*route, "from"), f"there is no stage {name!r} above{nearest(str(name), above)}")
            chosen += found
        return chosen

    def _inputs(self, route: Route, stage: Stage, chosen: list[Step], skip: str = "") -> dict[str, Input]:
        inputs, used = {}, set()
        for role, kinds in stage.inputs.items():
            if role == skip:
                continue
            fitting = [step for step in chosen if step.stage.kind in kinds]
            fitting = fitting or [step for step in self.steps if step.stage.kind in kinds]
            if not fitting:
                names = " or ".join(kinds)
                raise self.source.error(route, f"needs a {names} stage above it in the recipe")
            inputs[role] = Input(fitting[-1].name)
            used.add(fitting[-1].name)
        for step in chosen:
            if step.name not in used:
                kinds = ", ".join(sorted({kind for kinds in stage.inputs.values() for kind in kinds})) or "nothing"
                raise self.source.error((*route, "from"), f"{step.name!r} is of kind {step.stage.kind}; this stage takes {kinds}")
        return inputs

    def _with_evaluation_files(self) -> list[Step]:
        """Data is cleaned of what evaluations further down will ask."""
        files = tuple(dict.fromkeys(file for step in self.steps if step.stage.each_model for file in step.files))
        return [
            Step(step.name, step.group, step.stage, step.config, step.inputs, (*step.files, *files))
            if step.stage.reads_evaluation_files
            else step
            for step in self.steps
        ]
