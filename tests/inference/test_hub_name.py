"""A model by its name on a hub, for real: `headspring generate` reads from a hub on the loopback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from headspring.inference import LanguageModel
from tests.hub import Hub, commit_of

from .tiny import tiny_model

HEADSPRING = Path(sys.executable).with_name("headspring")
NEVER = {  # what no model may bring along: code, and weights that are unpickled
    "modeling_evil.py": b"raise SystemExit('remote code ran')\n",
    "pytorch_model.bin": b"\x80\x04no pickle is read.",
}


def as_files(lm, folder):
    lm.save(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    config = json.loads(files["config.json"]) | {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}
    return files | NEVER | {"config.json": json.dumps(config).encode()}


@pytest.fixture(scope="module")
def versions(tokenizer):
    return {name: LanguageModel(tiny_model(tokenizer.vocab_size, seed), tokenizer) for name, seed in (("main", 1), ("v1", 2))}


def generate(hub, home, *options):
    command = [str(HEADSPRING), "generate", "org/tiny", "--prompt", "def add", "--temperature", "0", "--max-tokens", "8"]
    return subprocess.run(
        [*command, "--json", *options], env=hub.environment(home), capture_output=True, text=True, timeout=100
    )


def test_a_model_by_name_is_read_at_its_revision_and_brings_no_code(versions, tmp_path):
    repositories = {("models", "org/tiny"): {name: as_files(lm, tmp_path / name) for name, lm in versions.items()}}
    with Hub(repositories) as hub:
        said = {name: generate(hub, tmp_path / "home", "--revision", name) for name in ("v1", "main")}
        asked = list(hub.asked)
        unknown = generate(hub, tmp_path / "home", "--revision", "v9")
    for name, done in said.items():
        assert done.returncode == 0, done.stderr
        expected = versions[name].generate("def add", max_tokens=8, temperature=0.0)[0]
        assert json.loads(done.stdout)["generations"][0]["text"] == expected.text
    assert {commit for _, _, commit, _ in asked} == {commit_of("v1"), commit_of("main")}
    assert not {path for _, _, _, path in asked} & set(NEVER)
    assert unknown.returncode == 2 and "org/tiny" in unknown.stderr and "v9" in unknown.stderr, unknown.stderr
