"""Whether a stage must run, and why: the wanted artifact is compared with the manifest of the one that is there."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headspring.artifacts.errors import CorruptArtifact
from headspring.artifacts.files import sha256_file, sha256_json
from headspring.artifacts.manifest import MANIFEST, Manifest, cache_key, read_manifest, verify
from headspring.line.recipe import Input, Step


@dataclass(frozen=True)
class Wanted:
    """What a stage's manifest must say for its artifact to be the wanted one."""

    kind: str
    revision: int
    config: dict[str, Any]
    inputs: dict[str, dict[str, str]]
    seed: int

    @property
    def key(self) -> str:
        return cache_key(self.kind, self.revision, self.config, self.inputs, self.seed)


def wanted(step: Step, seed: int, manifests: Mapping[str, Manifest]) -> Wanted:
    """The artifact `step` shall make of the artifacts above it, whose manifests are given by stage name."""
    inputs = {
        role: {"stage": str(source), "sha256": content_hash(manifests[source.step], source)}
        for role, source in step.inputs.items()
    }
    if step.files:
        hashes = [sha256_file(file) for file in step.files]
        inputs["files"] = {"stage": ", ".join(str(file) for file in step.files), "sha256": sha256_json(hashes)}
    if step.generator is not None:
        inputs["generator"] = {"stage": str(step.generator), "sha256": model_hash(step.generator)}
    outside = step.stage.fingerprint(step.config)
    if outside is not None:
        inputs["sources"] = {"stage": "outside the run", "sha256": outside}
    return Wanted(step.stage.kind, step.stage.revision, step.config.model_dump(mode="json"), inputs, seed)


def content_hash(manifest: Manifest, source: Input) -> str:
    """The hash of the artifact, or of the folder in it, that fills an input."""
    if not source.part:
        return manifest.content_hash
    inside = {name: digest for name, digest in manifest.outputs.items() if name.startswith(f"{source.part}/")}
    return sha256_json(inside)


def model_hash(path: Path) -> str:
    """A hash that changes with the model in `path`: of its weights and its tokenizer."""
    from headspring.inference.loading import find

    folder = find(path).folder
    assert folder is not None  # the recipe has checked that `path` is a folder
    files = sorted(file for file in folder.glob("*") if file.suffix in (".json", ".safetensors"))
    return sha256_json({file.name: sha256_file(file) for file in files if file.name != MANIFEST})


def finished(step: Step, folder: Path, check: bool) -> Manifest | None:
    """The manifest of the stage's artifact, every file checked where `check`; None where it did not finish.

    Raises `CorruptArtifact` that names the file and the way out."""
    try:
        manifest = read_manifest(folder)
        if manifest is not None and check:
            verify(folder, manifest)
        return manifest
    except CorruptArtifact as error:
        message = str(error).partition(";")[0]
        raise CorruptArtifact(f"{message}; `--force {step.name}` makes it again, the other stages are kept") from error


def reasons(before: Manifest, target: Wanted) -> list[str]:
    """What differs, in words: `config.steps 100 → 200`, `input tokens changed`, `revision 1 → 2`."""
    found = []
    if before.kind != target.kind:
        found.append(f"kind {before.kind} → {target.kind}")
    if before.revision != target.revision:
        found.append(f"revision {before.revision} → {target.revision}")
    if before.seed != target.seed:
        found.append(f"seed {before.seed} → {target.seed}")
    found += differences(before.config, target.config, "config")
    for role in sorted({*before.inputs, *target.inputs}):
        old, new = before.inputs.get(role, {}), target.inputs.get(role, {})
        if old.get("sha256") != new.get("sha256"):
            moved = old and new and old["stage"] != new["stage"]
            found.append(f"input {role} {old['stage']} → {new['stage']}" if moved else f"input {role} changed")
    return found


def differences(before: Any, after: Any, name: str) -> list[str]:
    """The leaves at which two JSON values differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(key for key in after if key not in before)]
        return [line for key in keys for line in differences(before.get(key), after.get(key), f"{name}.{key}")]
    return [] if before == after else [f"{name} {_short(before)} → {_short(after)}"]


def _short(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
