"""The safetensors of a folder in the layout of `transformers`: one file, or shards and an index. Never pickle.

What we write carries a hash of its tensors in the file's metadata, and a file that has one is checked when it is read. It
lies beside the tensors and not in config.json, because a program that writes new weights then drops it with the old ones.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from headspring.artifacts.errors import CorruptArtifact, UserError
from headspring.artifacts.files import read_json, write_atomic

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F32", "F16", "BF16")
HASH = "tensors_sha256"


def write(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write `tensors` (on the CPU, contiguous) as the one file of a folder, atomically."""
    write_atomic(folder / SINGLE, save(dict(tensors), metadata={"format": "pt", HASH: digest(tensors)}))


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, sizes and bytes."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


class Weights:
    """The tensors of a folder by name: sizes at once, values when they are asked for.

    Raises `UserError` where there are no safetensors, `CorruptArtifact` for a damaged file.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        self._hash: str | None = None
        for path, wanted in self._shards().items():
            self._open(path, wanted)

    def _shards(self) -> dict[Path, set[str] | None]:
        """Each file and the tensors it must hold; None where it says so itself."""
        if (self.folder / SINGLE).is_file():
            return {self.folder / SINGLE: None}
        if not (self.folder / INDEX).is_file():
            raise UserError(f"{self.folder}: {self._instead()}")
        shards: dict[Path, set[str] | None] = {}
        try:
            entries = read_json(self.folder / INDEX)["weight_map"].items()
            for tensor, name in entries:
                if Path(name).name != name:
                    raise UserError(f"{self.folder / INDEX}: {name!r} is not the name of a file in this folder")
                wanted = shards.setdefault(self.folder / name, set())
                assert wanted is not None
                wanted.add(tensor)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CorruptArtifact(f"{self.folder / INDEX}: not an index of shards ({type(error).__name__})") from error
        return shards

    def _instead(self) -> str:
        if any(self.folder.glob("*.bin")) or any(self.folder.glob("*.pth")):
            return "weights in pickle files can run code and are not read; take or make the model as safetensors"
        return f"no weights here ({SINGLE} or {INDEX})"

    def _open(self, path: Path, wanted: set[str] | None) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys()) if wanted is None else wanted
                self._hash = (file.metadata() or {}).get(HASH) if wanted is None else None
                for name in sorted(names):
                    part = file.get_slice(name)
                    self._files[name], self.shapes[name] = path, tuple(part.get_shape())
                    self._dtypes[name] = part.get_dtype()
        except (OSError, SafetensorError) as error:
            raise CorruptArtifact(f"{path}: cannot be read ({error}); get it again") from error

    def verify(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raise `CorruptArtifact` where the file records a hash and its tensors, all of them given, have another."""
        if self._hash is not None and self._hash != digest(tensors):
            raise CorruptArtifact(f"{self.folder / SINGLE}: its tensors differ from the hash it records")

    def check_dtypes(self, names: Iterable[str]) -> None:
        """Raise `UserError` for one of these tensors that is no plain floating-point numbers."""
        for name in names:
            if self._dtypes[name] not in DTYPES:
                found = f"{self._files[name]}: {name} is {self._dtypes[name]}"
                raise UserError(f"{found}; only {', '.join(DTYPES)} weights are supported")

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors hold the same numbers."""
        return self.shapes[name] == self.shapes[other] and torch.equal(self.read(name), self.read(other))

    def read(self, name: str) -> torch.Tensor:
        """The tensor, in the dtype in which it is stored."""
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)
