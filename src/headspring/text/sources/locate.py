"""From what a user names (a file, a folder, a glob, a URL) to the files it stands for, in a fixed order.

Every scheme of fsspec works whose package is installed. `s3://` works without one too: where `s3fs` is missing, pyarrow's
own client reads it, configured by the usual AWS_… variables and profile. That costs one function here and saves a user the
some ten packages behind `s3fs`; it gives up the options that only `s3fs` has.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import Any

import fsspec

from headspring.artifacts.errors import UserError

GLOB_CHARACTERS = frozenset("*?[")
SKIPPED_FOLDERS = {"__pycache__", "node_modules"}


@dataclass(frozen=True)
class File:
    """`path` on file system `system`; `name` is what is recorded and shown; `named`: the user named this very file."""

    system: Any
    path: str
    name: str
    named: bool


def locate(given: str, extensions: list[str] | None = None, exclude: list[str] | None = None) -> Iterator[File]:
    """Files for one path, in alphabetical order. Names keep the form in which the user gave the path.

    Raises `UserError` where nothing is there, naming what was looked for."""
    address = os.path.expanduser(given)
    try:
        system, root = _file_system(address)
        exists = system.exists(root)
        is_folder = exists and system.isdir(root)
        is_glob = not exists and not GLOB_CHARACTERS.isdisjoint(root)
        found = sorted(system.glob(root)) if is_glob else []
    except failures(address) as error:
        raise UserError(f"{given}: cannot be opened ({first_line(error)}); check the path or URL") from error
    if exists and not is_folder:
        yield File(system, root, address, named=True)
        return
    if not is_folder and not found:
        raise UserError(f"{given}: no such file or folder; check the path" + (" (no match)" if is_glob else ""))
    base = root.rstrip("/")
    try:
        paths = _files_under(system, root) if is_folder else [path for path in found if system.isfile(path)]
    except failures(address) as error:
        raise UserError(f"{given}: cannot be listed ({first_line(error)}); check its permissions") from error
    for path in paths:
        name = address.rstrip("/") + path[len(base) :] if is_folder else _as_given(address, path)
        if _wanted(name, path[len(base) :] if is_folder else path, extensions, exclude or []):
            yield File(system, path, name, named=False)


def _file_system(address: str) -> tuple[Any, str]:
    """The fsspec file system of an address, and the path on it."""
    try:
        return fsspec.core.url_to_fs(address)
    except ImportError:
        scheme, _, path = address.partition("://")
        if scheme not in ("s3", "s3a"):
            raise
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow.fs import S3FileSystem

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")  # pyarrow does not look for them
    return ArrowFSWrapper(S3FileSystem(endpoint_override=endpoint)), path


def failures(address: str) -> tuple[type[Exception], ...]:
    """What an address may raise that is not there or does not answer: clients of networks have kinds of their own."""
    return (Exception,) if "://" in address else (OSError, ValueError, ImportError)


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return getattr(error, "strerror", None) or (str(error).strip().splitlines() or [type(error).__name__])[0]


def _files_under(system: Any, root: str) -> list[str]:
    """Every regular file under `root`, sorted, that is neither hidden nor in a hidden or machine-made folder."""
    paths = []
    for folder, folders, files in system.walk(root, on_error="raise", detail=True):
        for name in list(folders):
            if name.startswith(".") or name in SKIPPED_FOLDERS:
                del folders[name]  # fsspec goes on with the folders left in its dictionary
        paths += [f"{folder.rstrip('/')}/{name}" for name in files if not name.startswith(".")]
    return sorted(path for path in paths if system.isfile(path))  # not pipes, sockets or devices


def _as_given(address: str, path: str) -> str:
    """A glob's match with the address's own scheme, or relative where the address was."""
    if "://" in address:
        return address.split("://", 1)[0] + "://" + path
    return path if os.path.isabs(address) else os.path.relpath(path)


def _wanted(name: str, inside: str, extensions: list[str] | None, exclude: list[str]) -> bool:
    if any(fnmatch(inside.lstrip("/"), pattern) or fnmatch(name, pattern) for pattern in exclude):
        return False
    if extensions is None:
        return True
    suffixes = {"." + extension.lstrip(".").lower() for extension in extensions}
    return PurePosixPath(name.lower()).suffix in suffixes
