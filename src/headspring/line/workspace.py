"""Where a stage works until it is done, so that nothing finished is ever lost.

    RUN/sft/            the finished artifact, its manifest written last
    RUN/sft.partial/    the attempt under way; renamed to RUN/sft/ when it is complete
    RUN/sft.partial/logs/attempt.json   the cache key of that attempt, whether it was forced, its seconds so far

A training stage goes on from the checkpoints of an attempt with the same cache key; every other attempt starts empty.
An older artifact stays until its successor is complete. A process killed between the two renames of that exchange
leaves the artifact beside its place; `recover` puts it back. What it gives up: for a while the disk holds both.
"""

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from headspring.artifacts.files import read_json, replace_folder, sync_folder, write_json
from headspring.artifacts.manifest import MANIFEST

ATTEMPT = Path("logs") / "attempt.json"  # in logs/, which takes no part in the artifact's hash


class Workspace:
    """The folders of one stage of one run."""

    def __init__(self, run: Path, name: str):
        self.folder = run / name
        self.partial = run / f"{name}.partial"

    def recover(self) -> None:
        """Finish or undo an exchange of folders that was cut short. Call it with the run locked."""
        old = sorted(self.folder.parent.glob(f".{self.folder.name}.old.*"))
        if not self.folder.exists():
            if (self.partial / MANIFEST).is_file():
                os.rename(self.partial, self.folder)
            elif old:
                os.rename(old.pop(), self.folder)
        for folder in old:
            shutil.rmtree(folder, ignore_errors=True)

    def begin(self, key: str, resumable: bool, forced: bool) -> float | None:
        """Make the partial folder ready. The seconds spent by the attempt that can be gone on with, or None.

        A forced stage starts anew, but goes on with an attempt that was forced itself: the same command, once more."""
        before = self.attempt()
        same = before.get("cache_key") == key and (before.get("forced") or not forced)
        if resumable and same and not (self.partial / MANIFEST).exists():
            return float(before.get("seconds", 0.0))
        self.discard()
        self.partial.mkdir(parents=True)
        if resumable:
            write_json(self.partial / ATTEMPT, {"cache_key": key, "forced": forced, "seconds": 0.0})
        return None

    def attempt(self) -> dict[str, Any]:
        """The note of the attempt under way; empty where there is none."""
        try:
            return read_json(self.partial / ATTEMPT)
        except (OSError, ValueError):
            return {}

    def note_seconds(self, seconds: float) -> None:
        """Remember what the attempt has cost so far; best effort, the disk may be full."""
        with suppress(OSError):
            write_json(self.partial / ATTEMPT, {**self.attempt(), "seconds": seconds})

    def finish(self) -> None:
        """Make the partial folder, its manifest written, the artifact."""
        for file in self.partial.rglob("*"):
            if file.is_file():
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
        sync_folder(self.partial)
        replace_folder(self.partial, self.folder)

    def discard(self) -> None:
        if self.partial.exists():
            shutil.rmtree(self.partial)
