"""`headspring serve` as a process: what it prints, answers, refuses, and how it ends on SIGTERM."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from headspring.artifacts import UserError
from headspring.cli import app
from headspring.cli.serve import named, named_adapters
from headspring.inference import LanguageModel
from tests.inference.tiny import tiny_model

COMMAND = str(Path(sys.executable).with_name("headspring"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> Path:
    place = tmp_path_factory.mktemp("models") / "long"
    LanguageModel(tiny_model(tokenizer.vocab_size, context=8192), tokenizer).save(place)
    return place


def start(*arguments, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [COMMAND, "serve", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def address(process) -> str:
    line = process.stdout.readline()
    found = re.search(r"serving (\S+) at (http://\S+)", line)
    assert found, line + (process.stderr.read() if process.poll() is not None else "")
    return found[2]


def test_it_serves_drains_on_sigterm_and_ends_with_0(folder):
    process = start(f"a={folder}", "--port", 0, "--drain-seconds", 20, HEADSPRING_API_KEY="a-key-that-is-long-enough")
    try:
        url, headers = address(process), {"Authorization": "Bearer a-key-that-is-long-enough"}
        assert httpx.get(f"{url}/health").status_code == 200 and httpx.get(f"{url}/v1/models").status_code == 401
        models = httpx.get(f"{url}/v1/models", headers=headers).json()
        assert [one["id"] for one in models["data"]] == ["a"]
        body = {"model": "a", "prompt": "x", "max_tokens": 1500, "ignore_eos": True, "stream": True, "temperature": 0}
        lines, begun = [], threading.Event()

        def read():
            with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=90) as answer:
                for line in answer.iter_lines():
                    lines.append(line)
                    begun.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert begun.wait(60)
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        while httpx.get(f"{url}/ready", headers=headers).status_code != 503 and time.monotonic() < deadline:
            time.sleep(0.02)
        late = httpx.post(f"{url}/v1/completions", json={**body, "stream": False}, headers=headers)
        assert late.status_code == 503 and late.headers["retry-after"]
        reader.join(90)
        assert [line for line in lines if line][-1] == "data: [DONE]", "what ran was finished"
        last = [json.loads(line[6:]) for line in lines if line.startswith("data: {")][-1]
        assert last["choices"][0]["finish_reason"] == "length"
        assert process.wait(30) == 0, process.stderr.read()
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()


def test_what_it_refuses_is_one_line(folder, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    keys = tmp_path / "keys"
    keys.write_text("a-key-that-is-long-enough\n")
    keys.chmod(0o644)
    cases = [
        ((folder, "--host", "0.0.0.0"), "give a key"),
        ((adapter,), "with --adapter NAME="),
        ((folder, "--adapter", f"poet={folder}"), "no LoRA adapter"),
        ((folder, "--adapter", f"poet={adapter}"), "peft_type"),
        ((folder, "--adapter", f"poet@other={adapter}"), "NAME@MODEL=FOLDER"),
        ((folder, "--adapter", f"long={adapter}"), "name of its own"),
        ((folder, "--key-file", keys), "chmod 600"),
        ((folder, folder), "two models are named"),
        ((folder, "--max-sequences", "0"), "max-sequences"),
        ((folder, "--port", "99999"), "port"),
    ]
    for arguments, words in cases:
        result = CliRunner().invoke(app, ["serve", *map(str, arguments)], env={"HEADSPRING_API_KEY": ""})
        assert isinstance(result.exception, UserError), (arguments, result.exception)
        assert words in str(result.exception) and "\n" not in str(result.exception)


def test_names_of_models():
    assert named(["runs/quickstart", "b=runs/other", "m.Q4.gguf"]) == {
        "quickstart": "runs/quickstart", "b": "runs/other", "m.Q4": "m.Q4.gguf",
    }  # fmt: skip
    for wrong in (["a=x", "a=y"], ["=x"], ["a="]):
        with pytest.raises(UserError):
            named(wrong)


def test_names_of_adapters():
    assert named_adapters(["poet=x", "clerk@b=y=z"], ["b"]) == {"poet": ("b", "x"), "clerk": ("b", "y=z")}
    assert named_adapters(["poet@a=x"], ["a", "b"]) == {"poet": ("a", "x")}
    for wrong in (["poet=x"], ["poet@c=x"], ["a@a=x"], ["poet@a=x", "poet@b=y"], ["poet@a="], ["@a=x"]):
        with pytest.raises(UserError):
            named_adapters(wrong, ["a", "b"])
