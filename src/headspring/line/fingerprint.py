"""Whether the text outside the run, which the data stage reads, is still the same.

A local file counts by path, size and time of change; Python and the packages that bring the embedded corpus by their
versions. That is a few milliseconds where hashing every byte would read the corpus twice. What it gives up: a file
touched but not changed is read again (its documents then come out equal, and nothing below repeats), and a remote file
is taken to be what it was.
"""

import glob
import os
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from headspring.artifacts.files import sha256_json


def sources_fingerprint(config: Any) -> str:
    """SHA-256 over the state of every local file and the version of every installed package that `config` names."""
    words = sorted(set(strings(config.model_dump(mode="json"))))
    paths = sorted({path for word in words for path in files(word)})
    return sha256_json([sys.version, [_version(word) for word in words], [_state(path) for path in paths]])


def strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def files(text: str) -> Iterator[str]:
    """The local files that a path, folder or glob stands for; none where the string is no path."""
    if os.sep not in text and "." not in text and not Path(text).exists():
        return  # a word of the config, such as a kind or a language
    pattern = os.path.expanduser(text.removeprefix("file://"))
    if "\0" in pattern or "://" in pattern:
        return
    found = [pattern] if os.path.exists(pattern) else glob.iglob(pattern, recursive=True)
    for path in found:
        if os.path.isdir(path):
            for folder, _, names in os.walk(path):
                yield from (os.path.join(folder, name) for name in names)
        else:
            yield path


def _version(word: str) -> str | None:
    """The version of the distribution of this name; None for words that name none."""
    try:
        return version(word) if word.replace("_", "").isalnum() else None
    except PackageNotFoundError:
        return None


def _state(path: str) -> tuple[str, int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return path, -1, -1
    return path, status.st_size, status.st_mtime_ns
