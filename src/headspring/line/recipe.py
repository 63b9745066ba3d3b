"""A recipe: the stages of a line, in order, with their configs.

Three keys at the top are the recipe's own (`recipe`, `description`, `seed`); every other key is a stage. Its kind is
its name up to the first `-` (`sft`, `sft-short`; `dpo` is of kind `preference`), or what its `kind:` says. Each input
is filled by the nearest stage above that can fill it, or by the one that `from:` names. `evaluate` stands for one
evaluation of every model stage above it, so that a change of `sft` repeats no evaluation of `pretrain`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    generator: Path | None = None  # a model from outside the run


@dataclass(frozen=True)
class Recipe:
    """A validated recipe. `steps` are in the order in which they run."""

    name: str
    description: str
    seed: int
    path: Path
    steps: tuple[Step, ...] = field(repr=False)

    def step(self, name: str) -> Step:
        """The step of this name. `UserError` where there is none."""
        for step in self.steps:
            if step.name == name:
                return step
        names = [step.name for step in self.steps]
        raise UserError(f"{name}: the recipe {self.name!r} has no such stage{nearest(name, names)}")

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
        from headspring.line.stages import STAGES

        registry = STAGES
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
        recipe, description, seed = self._header(path)
        for name, values in tree.items():
            if name not in RESERVED:
                self.add(name, values)
        if not self.steps:
            raise self.source.error((), "the recipe lists no stages")
        self._check_held_out()
        return Recipe(recipe, description, seed, path, tuple(self._with_evaluation_files()))

    def _header(self, path: Path) -> tuple[str, str, int]:
        given = {key: self.source.tree[key] for key in RESERVED if self.source.tree.get(key) is not None}
        recipe, description, seed = given.get("recipe", path.stem), given.get("description", ""), given.get("seed", 0)
        if not isinstance(recipe, str) or not _NAME.fullmatch(recipe.lower()):
            raise self.source.error(("recipe",), "a recipe's name is made of letters, digits, '-' and '_'")
        if not isinstance(description, str):
            raise self.source.error(("description",), "must be text")
        if type(seed) is not int or not 0 <= seed < 2**31:
            raise self.source.error(("seed",), "must be an integer between 0 and 2147483647")
        return recipe, description, seed

    def add(self, name: str, values: Any) -> None:
        route: Route = (name,)
        if not _NAME.fullmatch(name):
            raise self.source.error(route, "a stage's name is made of small letters, digits, '-' and '_'")
        if not isinstance(values, dict | None):
            raise self.source.error(route, f"a stage is a mapping of its keys, not {values!r}")
        values = dict(values or {})
        stage = self._stage(name, values)
        chosen = self._from(route, values.pop("from", None))
        generator = self._generator(route, stage, values)
        config = validate(stage.config(), values, route, self.source)
        if stage.each_model:
            self._add_each_model(name, stage, config, chosen)
        else:
            self._append(name, name, stage, config, self._inputs(route, stage, chosen), generator)

    def _add_each_model(self, name: str, stage: Stage, config: Any, chosen: list[Step]) -> None:
        models = [step for step in chosen or self.steps if step.stage.model]
        if not models:
            raise self.source.error((name,), "there is no model stage above to evaluate")
        pretrained = [step for step in models if step.stage.kind == "pretrain"]
        others = self._inputs((name,), stage, [], skip="model")
        if stage.before_training:
            for step in pretrained:
                suffix = INITIAL if len(pretrained) == 1 else f"{step.name}-{INITIAL}"
                inputs = {"model": Input(step.name, INITIAL), **others}
                self._append(f"{name}-{suffix}", name, stage, stage.before_training(config), inputs)
        for step in models:
            self._append(f"{name}-{step.name}", name, stage, config, {"model": Input(step.name), **others})

    def _append(
        self,
        name: str,
        group: str,
        stage: Stage,
        config: Any,
        inputs: dict[str, Input],
        generator: Path | None = None,
    ) -> None:
        if any(name == other.name for other in self.steps):
            raise self.source.error((group,), f"two stages would be called {name!r}")
        files = tuple(Path(file).expanduser() for file in stage.files(config))
        for file in files:
            if not file.is_file():
                raise self.source.error((group,), f"no such file: {file}")
        self.steps.append(Step(name, group, stage, config, inputs, files, generator))

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

    def _generator(self, route: Route, stage: Stage, values: dict[str, Any]) -> Path | None:
        """The model of `generator: PATH`, for stages that may write text with one."""
        if not stage.generates or values.get("generator") is None:
            return None
        path = Path(str(values.pop("generator"))).expanduser()
        if not path.is_dir():
            raise self.source.error((*route, "generator"), f"no such run or model folder: {path}")
        return path

    def _from(self, route: Route, names: Any) -> list[Step]:
        chosen = []
        for name in [names] if isinstance(names, str) else names or []:
            found = [step for step in self.steps if step.name == name]
            if not found:
                hint = nearest(str(name), [step.name for step in self.steps])
                raise self.source.error((*route, "from"), f"there is no stage {name!r} above{hint}")
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
                taken = ", ".join(sorted({kind for kinds in stage.inputs.values() for kind in kinds})) or "nothing"
                message = f"{step.name!r} is of kind {step.stage.kind}; this stage takes {taken}"
                raise self.source.error((*route, "from"), message)
        return inputs

    def _check_held_out(self) -> None:
        """A yardstick (xz, say) and the models beside it must be measured on the same documents, or neither says anything."""
        measured = [(step, step.stage.held_out(step.config)) for step in self.steps]
        measured = [(step, chosen) for step, chosen in measured if chosen is not None]
        for step, chosen in measured:
            models = [pair for pair in measured if pair[0].stage.each_model and pair[0].inputs["data"] == step.inputs["data"]]
            if models and not step.stage.each_model and all(chosen != theirs for _, theirs in models):
                other = models[-1][0].group
                said = step.group if "held_out" in (self.source.tree[step.group] or {}) else other
                wrong = f"{step.group} and {other} would measure different documents; give both the same held_out"
                raise self.source.error((said, "held_out"), wrong)

    def _with_evaluation_files(self) -> list[Step]:
        """Data is cleaned of what evaluations further down will ask."""
        files = tuple(dict.fromkeys(file for step in self.steps if step.stage.each_model for file in step.files))
        return [
            replace(step, files=(*step.files, *files)) if step.stage.reads_evaluation_files else step for step in self.steps
        ]
