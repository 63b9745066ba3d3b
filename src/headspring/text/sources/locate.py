"""From what a user names (a file, a folder, a glob, a URL) to the files it stands for, in a fixed order."""

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
        system, root = fsspec.core.url_to_fs(address)
        exists = system.exists(root)
        is_folder = exists and system.isdir(root)
        is_glob = not exists and not GLOB_CHARACTERS.isdisjoint(root)
        found = sorted(system.glob(root)) if is_glob else []
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{given}: cannot be opened ({str(error).splitlines()[0]}); check the path or URL") from error
    if exists and not is_folder:
        yield File(system, root, address, named=True)
        return
    if not is_folder and not found:
        raise UserError(f"{given}: no such file or folder; check the path" + (" (no match)" if is_glob else ""))
    base = root.rstrip("/")
    try:
        paths = _files_under(system, root) if is_folder else [path for path in found if system.isfile(path)]
    except OSError as error:
        raise UserError(f"{given}: cannot be listed ({error.strerror or error}); check its permissions") from error
    for path in paths:
        name = address.rstrip("/") + path[len(base) :] if is_folder else _as_given(address, path)
        if _wanted(name, path[len(base) :] if is_folder else path, extensions, exclude or []):
            yield File(system, path, name, named=False)


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
