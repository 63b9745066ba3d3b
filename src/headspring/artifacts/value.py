"""Configuration is a value: frozen, typed, and the same thing in Python, YAML and JSON.

Every config of every room derives from `Value`. Unknown keys are refused; the recipe reader turns pydantic's error
into one line with the nearest valid key and the line of the file.

`Variant` is for values of which there are several kinds, such as the mixers of a block. A field annotated with the base
(`mixer: Mixer`) takes any of them, told apart by `kind`. A new kind is a new subclass: it registers itself, and no union
anywhere has to be extended. What this gives up: the list of kinds is known when the program runs, not before.
"""

import difflib
import inspect
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


class Value(BaseModel):
    """A frozen pydantic model that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class Variant(Value):
    """Base of a family of values. A subclass without a `kind` of its own names a family; those below it have one each."""

    kind: str
    kinds: ClassVar[dict[str, type["Variant"]]] = {}
    default_kind: ClassVar[str | None] = None  # of a mapping that names none

    @classmethod
    def _names_the_family(cls) -> bool:
        """Whether this is a family, whose `kind` has no value of its own, and not one of its members."""
        return next(found["kind"] for base in cls.__mro__ if "kind" in (found := inspect.get_annotations(base))) is str

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        if cls._names_the_family():
            if Variant in cls.__bases__:  # else it only holds what some members of a family share
                cls.kinds = {}
            return
        name = cls.__pydantic_fields__["kind"].default
        families = [base for base in cls.__mro__ if "kinds" in base.__dict__ and base is not Variant]
        for family in families:
            other = family.kinds.setdefault(name, cls)  # type: ignore[attr-defined]
            assert other.__qualname__ == cls.__qualname__, f"{other.__qualname__} and {cls.__qualname__} are both {name!r}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if not cls._names_the_family():
            return handler(source)
        return core_schema.no_info_plain_validator_function(
            cls.choose,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda value, info: value.model_dump(mode=info.mode), info_arg=True
            ),
        )

    @classmethod
    def choose(cls, value: Any) -> Self:
        if isinstance(value, cls):
            return value
        if isinstance(value, dict) and cls.default_kind is not None:
            value = {"kind": cls.default_kind, **value}
        if not isinstance(value, dict) or "kind" not in value:
            known = ", ".join(sorted(cls.kinds))
            raise PydanticCustomError("kind_missing", "must be a mapping with a kind, one of: {known}", {"known": known})
        chosen = cls.kinds.get(value["kind"])
        if chosen is None:
            near = difflib.get_close_matches(str(value["kind"]), cls.kinds, len(cls.kinds), cutoff=0.0)
            details = {"kind": str(value["kind"]), "near": ", ".join(near)}
            raise PydanticCustomError("kind_unknown", "no kind '{kind}'; the nearest are: {near}", details)
        return chosen.model_validate(value)  # type: ignore[return-value]
