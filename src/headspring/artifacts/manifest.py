"""The manifest: what an artifact is, what it was made of, and the hash of every file in it.

`RUN/<stage>/manifest.json` is written last. A stage folder without a valid manifest is a stage that did not finish.
The cache key is kind + revision + config + the keys' hashes of the inputs; the code's commit is recorded but does not
take part, so that editing a comment repeats nothing.
"""

import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from headspring.artifacts.errors import CorruptArtifact, UserError
from headspring.artifacts.files import read_json, sha256_file, sha256_json, write_json

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"


class Manifest(BaseModel):
    """One stage's artifact. `inputs` maps a role to the `content_hash` of the artifact that filled it."""

    schema_version: int = SCHEMA_VERSION
    name: str
    kind: str
    revision: int
    config: dict[str, Any]
    inputs: dict[str, dict[str, str]] = Field(default_factory=dict)  # role -> {"stage": …, "sha256": …}
    outputs: dict[str, str] = Field(default_factory=dict)  # relative path -> sha256
    environment: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0
    metrics: dict[str, Any] = Field(default_factory=dict)
    cost: dict[str, float] = Field(default_factory=dict)  # seconds, peak_memory_bytes, flops, …
    created: float = Field(default_factory=time.time)

    @property
    def content_hash(self) -> str:
        """What the stages downstream depend on: the bytes of the outputs, not when or how long."""
        return sha256_json(self.outputs)

    @property
    def cache_key(self) -> str:
        """Two stages with the same key would compute the same artifact."""
        return cache_key(self.kind, self.revision, self.config, self.inputs, self.seed)


def cache_key(kind: str, revision: int, config: dict[str, Any], inputs: dict[str, dict[str, str]], seed: int) -> str:
    """kind + revision + config + input hashes + seed. The names of stages and the code's commit take no part."""
    hashes = {role: source["sha256"] for role, source in inputs.items()}
    return sha256_json({"kind": kind, "revision": revision, "config": config, "inputs": hashes, "seed": seed})


def hash_outputs(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under `folder` except its manifest and the checkpoints' and logs' folders."""
    folder = Path(folder)
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST)
    relative = [(file.relative_to(folder), file) for file in files]
    return {str(name): sha256_file(file) for name, file in relative if name.parts[0] not in ("checkpoints", "logs")}


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Hash the folder's files into the manifest and write it, last and atomically."""
    manifest = manifest.model_copy(update={"outputs": hash_outputs(folder)})
    write_json(Path(folder) / MANIFEST, manifest.model_dump(mode="json"))
    return manifest


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest, or None where there is none (the stage did not finish).

    Raises `UserError` for a manifest of another schema version, `CorruptArtifact` for one that does not parse."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    try:
        value = read_json(path)
        version = value.get("schema_version")
        if version != SCHEMA_VERSION:
            raise UserError(f"{path}: schema version {version}, this Headspring writes {SCHEMA_VERSION}; use another --run-dir")
        return Manifest.model_validate(value)
    except (ValueError, AttributeError, ValidationError) as error:
        raise CorruptArtifact(f"{path}: not a manifest ({type(error).__name__}); delete the folder to make it again") from error


def verify(folder: Path, manifest: Manifest) -> None:
    """Raise `CorruptArtifact`, naming the file, unless every output has the hash the manifest records."""
    for name, expected in manifest.outputs.items():
        path = Path(folder) / name
        if not path.is_file():
            raise CorruptArtifact(f"{path}: missing, though {folder}/{MANIFEST} lists it")
        if sha256_file(path) != expected:
            raise CorruptArtifact(f"{path}: content differs from the hash in {folder}/{MANIFEST}")
