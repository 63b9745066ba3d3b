"""What a dialect is, where dialects register, and how config.json is read.

    @dialect
    class GPT2(Dialect):
        architecture, model_type = "GPT2LMHeadModel", "gpt2"
        defaults = {"layer_norm_epsilon": 1e-5}        # what its config class assumes of a key that config.json leaves out
        fixed = {"activation_function": "gelu_new"}    # the only value with which ours is the same function

        def model(self, config: Settings) -> Model: ...            # config.json → value
        def config(self, model: Model) -> dict[str, Any]: ...      # value → config.json, as far as there are words for it
        def rules(self, model: Model) -> Iterator[Rule]: ...       # tensors (`rules`, `moves`), layer by layer

A base class of several dialects is a `Dialect` without the decorator. `model` may assume that keys are there and of a
sensible type: what they raise otherwise becomes one line for the user. `config` need not test whether the model can be
said: what it leaves out is found by reading it back (`losses`). It must only fail with `UserError` where a part is of
another kind than its words are for; `part` does that.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import ValidationError

from headspring.artifacts.errors import UserError
from headspring.artifacts.value import Variant
from headspring.models.dialects.rules import Rule
from headspring.models.model import Model

DIALECTS: dict[str, "Dialect"] = {}
Part = TypeVar("Part")
NEEDED = "a new one is a file in models/dialects/ with its config and a table of its tensors"


class WrongModel(UserError):
    """The model as a whole is of another kind than a dialect is for."""


class Settings(Mapping[str, Any]):
    """The content of a config.json, over the defaults of its config class. A missing key raises `KeyError`, as in any mapping.

    `most` is how many layers or experts a model can have at all: as many as there are tensors in its file.
    """

    def __init__(self, values: Mapping[str, Any], most: int | None = None):
        self._values, self._most = dict(values), most

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def count(self, key: str) -> int:
        """A number of layers or experts. Raises `UserError` for more than the file has tensors, before any is built."""
        number = self[key]
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise UserError(f"config.json: {key} = {number!r} is no count")
        if self._most is not None and number > self._most:
            raise UserError(f"config.json: {key} = {number}, and the file has {self._most} tensors: too few for that")
        return number

    def refuse_unless(self, **only: Any) -> None:
        """Raise `UserError` for a key that is set to anything but its one supported value."""
        for key, value in only.items():
            if self.get(key, value) != value:
                raise UserError(f"config.json: {key} = {self[key]!r} is not supported, only {value!r}")


class Dialect:
    """One architecture of `transformers`. See the head of this file.

    `aliases`: older name of a key → its name. `ignored`: patterns (`*` stands for anything) of tensors that follow from the
    config. `prefix`: the start of names that a file saved from the bare model lacks.
    """

    architecture: ClassVar[str]
    model_type: ClassVar[str]
    defaults: ClassVar[Mapping[str, Any]] = {}
    fixed: ClassVar[Mapping[str, Any]] = {}
    aliases: ClassVar[Mapping[str, str]] = {}
    ignored: ClassVar[tuple[str, ...]] = ("*.rotary_emb.inv_freq",)
    prefix: ClassVar[str] = ""

    def model(self, config: Settings) -> Model:
        raise NotImplementedError

    def config(self, model: Model) -> dict[str, Any]:
        raise NotImplementedError

    def rules(self, model: Model) -> Iterable[Rule]:
        raise NotImplementedError

    def left_out(self, model: Model) -> tuple[str, ...]:
        """Patterns of the tensors that are not read: `ignored`, and what only this model's file has beside its own."""
        return self.ignored

    def copies(self, model: Model) -> Mapping[str, str]:
        """Tensors that a file may hold beside the ones they equal: copy → original, both their names. Never written."""
        return {}

    def read(self, config: Mapping[str, Any], most: int | None = None) -> Model:
        """The value that the content of a config.json describes. Raises `UserError` where it is another function than ours."""
        renamed = {self.aliases.get(key, key): value for key, value in config.items()}
        settings = Settings({**self.defaults, **renamed}, most)
        if settings.get("quantization_config"):
            raise UserError("config.json: quantization_config: quantized weights are not supported; take the original model")
        settings.refuse_unless(**self.fixed)
        try:
            return self.model(settings)
        except KeyError as error:
            raise UserError(f"config.json does not say {error}, which a {self.architecture} needs") from None
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "config"
            raise UserError(f"config.json describes no {self.architecture}: {field}: {first['msg']}") from None
        except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
            raise UserError(f"config.json describes no {self.architecture}: {error}") from None

    def write(self, model: Model) -> dict[str, Any]:
        """The content of the config.json that describes `model`. Raises `UserError` where parts are of another kind."""
        return {"architectures": [self.architecture], "model_type": self.model_type, **self.fixed, **self.config(model)}

    def part(self, value: Any, kind: type[Part], where: str) -> Part:
        """`value`, which is of this kind. Raises `UserError` where it is of another."""
        if isinstance(value, kind):
            return value
        found = f"of kind {value.kind!r}" if isinstance(value, Variant) else "absent" if value is None else repr(value)
        error = WrongModel if isinstance(value, Model) else UserError
        raise error(f"{where} is {found}, and {self.architecture} has a {kind.__name__} there")


def dialect(kind: type[Dialect]) -> type[Dialect]:
    """Register the decorated class."""
    assert kind.architecture not in DIALECTS, f"two dialects for {kind.architecture!r}"
    DIALECTS[kind.architecture] = kind()
    return kind


def by_name(architecture: str) -> Dialect:
    """Raises `UserError` with the nearest names."""
    if architecture not in DIALECTS:
        near = difflib.get_close_matches(architecture, DIALECTS, 5, cutoff=0.0)
        raise UserError(f"architecture {architecture!r} is not supported; the nearest that are: {', '.join(near)} ({NEEDED})")
    return DIALECTS[architecture]


def of_config(config: Mapping[str, Any]) -> Dialect:
    """The dialect that a config.json names: by its architecture, or else by its model_type."""
    names, kind = config.get("architectures"), config.get("model_type")
    if isinstance(names, list) and names:
        return by_name(str(names[0]))
    found = {dialect.model_type: dialect for dialect in reversed(DIALECTS.values())}
    if kind not in found:
        near = difflib.get_close_matches(str(kind), found, 5, cutoff=0.0)
        raise UserError(f"model_type {kind!r} is not supported; the nearest that are: {', '.join(near)} ({NEEDED})")
    return found[kind]
