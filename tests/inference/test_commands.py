"""`headspring generate` and `headspring chat`, as a user runs them."""

import json
import runpy
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from headspring.artifacts import UserError
from headspring.artifacts.manifest import Manifest, write_manifest
from headspring.cli import generate as commands
from headspring.models import save_model

from .tiny import tiny_model


@pytest.fixture(scope="module")
def model(lm, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    lm.save(folder)
    return str(folder)


@pytest.fixture
def run():
    app = typer.Typer(pretty_exceptions_enable=False)
    commands.register(app)
    runner = CliRunner()

    def call(*arguments, stdin=None):
        result = runner.invoke(app, list(map(str, arguments)), input=stdin)
        if isinstance(result.exception, UserError):
            raise result.exception
        return result

    return call


def test_generate_streams_what_python_gives(run, lm, model):
    options = {"max_tokens": 12, "seed": 3, "temperature": 0.8, "top_p": 0.95}
    expected = lm.generate("def add", **options)[0].text
    for switch in ("--stream", "--no-stream"):
        result = run("generate", model, "--prompt", "def add", "--max-tokens", 12, "--seed", 3, switch)
        assert result.exit_code == 0 and result.stdout == expected + "\n"


def test_every_option_reaches_the_sampler(run, lm, model):
    options = {"temperature": 1.7, "top_k": 40, "top_p": 0.97, "min_p": 0.001, "repetition_penalty": 1.3, "seed": 1}
    arguments = [text for key, value in options.items() for text in (f"--{key.replace('_', '-')}", value)]
    result = run("generate", model, "--prompt", "x", "--max-tokens", 30, "--stop", "a", "--stop", "e", *arguments)
    assert result.stdout == lm.generate("x", max_tokens=30, stop=["a", "e"], **options)[0].text + "\n"


def test_json(run, model):
    arguments = ("--max-tokens", 4, "--n", 2, "--logprobs", 2, "--json", "--dtype", "bf16", "--device", "cpu")
    report = json.loads(run("generate", model, "--prompt", "-", *arguments, stdin="naïve 🙂").stdout)
    assert report["prompt"] == "naïve 🙂" and len(report["generations"]) == 2 and report["tokens_per_second"] > 0
    first = report["generations"][0]
    assert len(first["token_ids"]) == len(first["logprobs"]) == len(first["top_logprobs"]) <= 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nowhere", "--prompt", "x"), "no such folder"),
        (("MODEL", "--prompt", "x", "--temperature", "-1"), "temperature"),
        (("MODEL", "--prompt", "x", "--logprobs", "1"), "--json"),
        (("MODEL", "--prompt", "x" * 5000), "context"),
        (("MODEL", "--prompt", "-"), "UTF-8"),
    ],
    ids=str,
)
def test_bad_input(run, model, arguments, says):
    arguments = [model if argument == "MODEL" else argument for argument in arguments]
    with pytest.raises(UserError, match=says):
        run("generate", *arguments, stdin=b"\xff\xfe")


def test_chat_keeps_the_conversation_until_reset(run, lm, model):
    options = ("--temperature", 0, "--max-tokens", 6, "--top-p", 1, "--system", "s")
    result = run("chat", model, *options, stdin="one\n\ntwo\n/nonsense\n/reset\none\n/quit\nthree\n")
    assert result.exit_code == 0
    conversation, answers = [{"role": "system", "content": "s"}], []
    for question in ("one", "two"):
        conversation.append({"role": "user", "content": question})
        answers.append(lm.chat(conversation, temperature=0.0, max_tokens=6).text)
        conversation.append({"role": "assistant", "content": answers[-1]})
    assert result.stdout == "".join(f"{answer}\n" for answer in (*answers, answers[0]))
    assert "/nonsense: unknown" in result.stderr and "a new conversation" in result.stderr


def test_chat_forgets_the_oldest_turns_when_the_context_is_full(run, model):
    result = run("chat", model, "--max-tokens", 20, "--seed", 1, stdin="tell me about the quick brown fox\n" * 6)
    assert result.exit_code == 0 and "are forgotten" in result.stderr


def test_a_question_beyond_the_context_is_refused(run, model):
    with pytest.raises(UserError, match="context"):
        run("chat", model, stdin="x" * 500 + "\n")


def test_a_base_model_says_so(run, tokenizer, tmp_path):
    save_model(tiny_model(tokenizer.vocab_size), tmp_path / "pretrain")
    tokenizer.save(tmp_path / "pretrain")
    write_manifest(tmp_path / "pretrain", Manifest(name="pretrain", kind="pretrain", revision=1, config={}))
    result = run("chat", tmp_path, "--max-tokens", 3, stdin="hi\n")
    assert result.stderr.count("base model") == 1


def test_a_terminal_is_not_steered_by_a_model(monkeypatch, capsys):
    pieces = ["a\x1b[2J", "\tb\n\x9b"]
    assert commands._show(iter(pieces)) == "".join(pieces)
    assert capsys.readouterr().out == "".join(pieces) + "\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert commands._show(iter(pieces)) == "".join(pieces)
    assert capsys.readouterr().out == "a\ufffd[2J\tb\n\ufffd\n"


def test_the_example_runs(model, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["generate.py", model])
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "generate.py"), run_name="__main__")
    assert "LanguageModel(" in capsys.readouterr().out


def test_help_has_an_example(run):
    for verb in ("generate", "chat"):
        assert f"headspring {verb} runs/quickstart" in run(verb, "--help").stdout
