"""Language identification for prose, on request: py3langid, whose model (97 languages) ships inside its wheel.

Chosen because it works offline. fastText's lid.176 and GlotLID are better on short and mixed text, but are downloads
of 126 MB and more. The score is langid's probability, normalised over all its languages.
"""

from functools import lru_cache
from typing import Any

from pydantic import Field, model_validator

from headspring.artifacts.errors import UserError
from headspring.artifacts.value import Value

RULE = "language"
MAXIMUM_CHARACTERS = 20_000  # more text does not change the answer, and langid's time is linear in it


class LanguageConfig(Value):
    """`keep`: ISO 639-1 codes of the languages to keep; None asks nothing and filters nothing. A bare list is `keep`.
    `threshold`: the least probability, FineWeb's 0.65."""

    keep: list[str] | None = Field(default=None, min_length=1)
    threshold: float = Field(default=0.65, ge=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _list_is_keep(cls, value: Any) -> Any:
        return {"keep": value} if isinstance(value, list | tuple) else value


@lru_cache(maxsize=1)
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise UserError("`languages` needs py3langid: pip install 'py3langid>=0.4'") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def identify(text: str) -> tuple[str, float]:
    """(ISO 639-1 code, probability) of the language that `text` is most likely written in."""
    code, probability = _identifier().classify(text[:MAXIMUM_CHARACTERS])
    return str(code), float(probability)


def declared(language: str | None) -> tuple[str, float] | None:
    """What a source itself says ("pt_BR" counts as "pt") is certain and needs no guess; None where it says nothing."""
    return (language.replace("-", "_").split("_")[0].lower(), 1.0) if language else None


def check_languages(config: LanguageConfig) -> None:
    """Raise `UserError` for a code the model does not know."""
    if config.keep is None:
        return
    known = [str(code) for code in _identifier().labels]
    for code in config.keep:
        if code not in known:
            raise UserError(f"languages: {code!r} is not one of the codes py3langid knows ({', '.join(sorted(known))})")
