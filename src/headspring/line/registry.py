"""What a stage is, to the line: nouns only. `stages.py` holds the table of the real ones."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from headspring.artifacts.value import Value


@dataclass(frozen=True)
class Context:
    """What a stage's function is given.

    `inputs` maps a role to the folder that fills it. `files` are the paths from outside the run which the recipe names
    and the line checks (evaluation sets), `generator` a model from outside it (a run or a model's folder). `folder` is
    where the stage writes; it may hold the `checkpoints/` of an earlier attempt with the same cache key.
    """

    config: Any
    inputs: Mapping[str, Path]
    folder: Path
    seed: int
    files: tuple[Path, ...] = ()
    generator: Path | None = None


@dataclass(frozen=True)
class Estimate:
    """What a stage is expected to cost; None where it is not known before the stages above have run."""

    seconds: float | None = None
    tokens: float | None = None
    parameters: float | None = None
    flops: float | None = None
    bytes: float | None = None  # of text that comes out
    sample_tokens: float | None = None  # tokens of one training sample
    seconds_per_token: float | None = None  # of training on one token

    def with_seconds(self, seconds: float | None) -> "Estimate":
        return replace(self, seconds=seconds)

    def inheriting(self, model: "Estimate | None") -> "Estimate":
        """With what is known of the model it starts from, where nothing better is."""
        names = ("parameters", "sample_tokens", "seconds_per_token") if model else ()
        return replace(self, **{name: getattr(model, name) for name in names if getattr(self, name) is None})


@dataclass(frozen=True)
class Sizes:
    """Of a model in training: `parameters`, how many of them are hidden `matrices`, the `vocab`ulary, and the bytes that a
    backward pass keeps for a token in half precision, with activations kept or (`checkpointed`) made again by layer."""

    parameters: float
    matrices: float
    vocab: float
    activations: float
    checkpointed: float
    context: float


@dataclass(frozen=True)
class Memory:
    """Bytes that training holds at its peak, beside what Python and torch take themselves. `weights` are the trained model and
    frozen ones beside it, `logits` those of one chunk of rows."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    tokens: float  # that are computed at once
    sizes: Sizes

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits

    def as_json(self) -> dict[str, float]:
        names = ("weights", "gradients", "optimizer", "activations", "logits", "total", "tokens")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Known:
    """What an estimate may build on: configs, estimates and memories of the stages that fill its inputs, by role."""

    configs: Mapping[str, Any]
    estimates: Mapping[str, Estimate]
    bytes: float | None = None  # of text in the data stage's artifact
    memories: Mapping[str, Memory | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """One kind of step of the line.

    A raised `revision` says that the same config and inputs now give another artifact: folders of an older one are
    made again. `inputs` maps a role to the kinds that can fill it; the nearest stage above with such a kind does.
    """

    kind: str
    revision: int
    config: Callable[[], type[Value]]  # a function, so that listing the stages imports no room
    run: Callable[[Context], dict[str, Any]]  # returns the metrics
    inputs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    training: bool = False  # continues from its folder's checkpoints/, and runs on every rank under torchrun
    model: bool = False  # its folder is a model that generate, chat and evaluate can load
    each_model: bool = False  # one step for each model stage above, not one
    generates: bool = False  # its recipe entry may name a `generator`, a model from outside the run
    reads_evaluation_files: bool = False  # is given the files of every evaluation of the recipe (decontamination)
    files: Callable[[Any], Sequence[str]] = lambda config: ()  # paths from outside the run that its config names
    fingerprint: Callable[[Any], str | None] = lambda config: None  # of other outside things it reads; None: nothing
    held_out: Callable[[Any], Any] = lambda config: None  # the choice of documents it measures; None: it measures none
    before_training: Callable[[Any], Any] | None = None  # config for the untrained model; None: it is not evaluated
    estimate: Callable[[Any, Known], Estimate] = lambda config, known: Estimate()
    memory: Callable[[Any, Known], Memory | None] = lambda config, known: None


Registry = Mapping[str, Stage]
