"""Masking of e-mail addresses, public IP addresses and secret keys. Off unless asked for.

Regular expressions, as FineWeb and StarCoder use for the same three kinds: cheap, explainable, and blind to names,
phone numbers and postal addresses, for which a model is needed. A masked document is no longer `verbatim`, for its
bytes are not the file's any more. Addresses that the standards reserve for documentation and private networks stay:
they identify nobody, and code is full of them.
"""

import ipaddress
import re
from collections.abc import Sequence
from typing import Literal

Mask = Literal["email", "ip", "key"]

EMAIL = re.compile(r"\b[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62})\.)+[A-Za-z]{2,24}\b")
RESERVED_EMAIL = re.compile(r"(?:\.|@)(?:example\.(?:com|org|net)|example|invalid|test|localhost)$", re.IGNORECASE)
IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\d)")
IPV6 = re.compile(r"(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
KEYS = re.compile(
    r"""
    -----BEGIN\ (?:[A-Z]+\ )?PRIVATE\ KEY-----[\s\S]{0,20000}?-----END\ (?:[A-Z]+\ )?PRIVATE\ KEY-----
    | \bAKIA[0-9A-Z]{16}\b                                # Amazon Web Services
    | \bgh[pousr]_[A-Za-z0-9]{36,}\b                      # GitHub
    | \bhf_[A-Za-z0-9]{30,}\b                             # Hugging Face
    | \bsk-[A-Za-z0-9_-]{20,}\b                           # OpenAI, Anthropic
    | \bxox[abprs]-[A-Za-z0-9-]{10,}\b                    # Slack
    | \bAIza[A-Za-z0-9_-]{35}\b                           # Google
    | \beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}  # JSON Web Token
    """,
    re.VERBOSE,
)
PLACEHOLDERS: dict[Mask, str] = {"email": "<email>", "ip": "<ip address>", "key": "<key>"}


def mask(text: str, kinds: Sequence[Mask]) -> tuple[str, dict[str, int]]:
    """`text` with placeholders, and how often each kind was replaced (kinds that were not found are left out)."""
    counts: dict[str, int] = {}

    def replace(kind: Mask, pattern: re.Pattern[str], text: str) -> str:
        def replacement(match: re.Match[str]) -> str:
            if not _is_personal(kind, match[0]):
                return match[0]
            counts[kind] = counts.get(kind, 0) + 1
            return PLACEHOLDERS[kind]

        return pattern.sub(replacement, text)

    if "key" in kinds:
        text = replace("key", KEYS, text)
    if "email" in kinds and "@" in text:
        text = replace("email", EMAIL, text)
    if "ip" in kinds:
        text = replace("ip", IPV6, replace("ip", IPV4, text))
    return text, counts


def _is_personal(kind: Mask, found: str) -> bool:
    if kind == "email":
        return RESERVED_EMAIL.search(found) is None
    if kind == "ip":
        try:
            address = ipaddress.ip_address(found)
        except ValueError:
            return False  # a version number such as 999.1.2.3, or a time of day
        # IPv6 is assigned from 2000::/3 only; outside it stand expressions such as Python's a[1::2].
        return address.is_global and (address.version == 4 or int(address) >> 125 == 1)
    return True
