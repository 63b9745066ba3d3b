"""Numbers as a person reads them, and text that cannot hurt the page."""

import math
import unicodedata

MINUS = "−"


def count(value: float | None) -> str:
    """4096 → 4,096; 5 030 000 → 5.03 M."""
    if value is None:
        return "–"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}"


def byte_count(value: float | None) -> str:
    """11 800 000 → 11.8 MB (decimal units)."""
    if value is None:
        return "–"
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f} B"


def seconds(value: float | None) -> str:
    """0.42 → 0.4 s; 132 → 2 min 12 s."""
    if value is None:
        return "–"
    if value < 59.5:
        return f"{value:.1f} s" if value < 9.95 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest:02d} s"


def percent(rate: float | None) -> str:
    """0.4567 → 45.7 %."""
    return "–" if rate is None else f"{100 * rate:.1f} %"


def signed_points(difference: float) -> str:
    """0.123 → +12.3 (percentage points)."""
    return signed(100 * difference, 1)


def signed(value: float, digits: int = 3) -> str:
    """A number with its sign, with a real minus; ±0.0 for what rounds to nothing."""
    text = f"{value:+.{digits}f}"
    return f"±{text[1:]}" if float(text) == 0 else text.replace("-", MINUS)


def plain(value: float | None, digits: int = 3) -> str:
    """A number with a fixed number of decimals."""
    return "–" if value is None else f"{value:.{digits}f}".replace("-", MINUS)


def significant(value: float, step: float | None = None) -> str:
    """Three significant digits: 0.0003, 12.3 k; on an axis as many as tell values apart that are `step` apart."""
    if value == 0:
        return "0"
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}".replace("-", MINUS)
    digits = 3 if step is None else max(3, 1 + math.floor(math.log10(abs(value))) - math.floor(math.log10(step)))
    return f"{value:.{digits}g}".replace("e-0", "e-").replace("-", MINUS)


def visible(text: object) -> str:
    """Text from a model or a document, made safe to show: control characters as their pictures, no lone surrogates.

    Markup is escaped by the template; this is for what escaping leaves: NUL and friends, and directional overrides,
    which could make the page read as something else.
    """
    return "".join(_visible(character) for character in str(text).encode("utf-8", "replace").decode("utf-8"))


def _visible(character: str) -> str:
    code = ord(character)
    if character in "\n\t" or (code >= 0x20 and unicodedata.category(character) not in ("Cc", "Cf")):
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    if character in "\u200c\u200d":  # joiners that scripts and emoji need
        return character
    return "\ufffd"
