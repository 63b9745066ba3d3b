"""`headspring tokens …` as a user types it."""

import json
import shutil
import sys

import pytest

from headspring.cli import main
from headspring.tokenization import Tokenizer


def call(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", ["headspring", "tokens", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        main()
    captured = capsys.readouterr()
    return exit.value.code or 0, captured.out, captured.err


@pytest.fixture
def folder(bpe: Tokenizer, tmp_path):
    bpe.save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_train(monkeypatch, capsys, tmp_path, kind: str):
    arguments = [shutil.__file__, "--vocab-size", 700, "--kind", kind, "--out", tmp_path / "out", "--json"]
    code, out, _ = call(monkeypatch, capsys, "train", *arguments)
    figures = json.loads(out)
    assert code == 0 and figures["vocab_size"] == 700 and figures["characters"] > 50_000
    assert Tokenizer.load(tmp_path / "out").vocab_size == 700


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocab-size", "100"], "too small"),
        (["--vocab-size", "90000"], "possible; use vocab_size="),
        (["--vocab-size", "-5"], "--vocab-size: "),
        (["--kind", "magic"], "--kind: "),
        (["--kind", "unigram", "--min-frequency", "4"], "leave it out"),
    ],
)
def test_train_refuses(monkeypatch, capsys, tmp_path, arguments: list[str], message: str):
    code, _, error = call(monkeypatch, capsys, "train", shutil.__file__, "--out", tmp_path / "out", *arguments)
    assert code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_train_on_nothing(monkeypatch, capsys, tmp_path):
    code, _, error = call(monkeypatch, capsys, "train", tmp_path / "nothing", "--out", tmp_path / "out")
    assert code == 2 and "nothing" in error
    (tmp_path / "empty.txt").write_text("")
    code, _, error = call(monkeypatch, capsys, "train", tmp_path / "empty.txt", "--out", tmp_path / "out")
    assert code == 2 and "empty" in error


def test_explain(monkeypatch, capsys, folder):
    code, out, _ = call(monkeypatch, capsys, "explain", "cryptocurrency", "--tokenizer", folder)
    assert code == 0 and "rank" in out and "63" in out
    code, out, _ = call(monkeypatch, capsys, "explain", "cryptocurrency", "--tokenizer", folder, "--json")
    assert json.loads(out)["agrees"] is True
    code, _, error = call(monkeypatch, capsys, "explain", "x", "--tokenizer", folder / "nothing")
    assert code == 2 and "no such file" in error


def test_compare(monkeypatch, capsys, folder):
    sizes = ["--vocab-sizes", "300,400", "--train-on", shutil.__file__, "--corpus", shutil.__file__]
    code, out, _ = call(monkeypatch, capsys, "compare", folder, *sizes, "--json")
    found = json.loads(out)["tokenizers"]
    assert code == 0 and list(found) == [str(folder), "bpe-300", "bpe-400"]
    assert found["bpe-300"]["faults"]["never_trained"] is not None
    assert found["bpe-300"]["corpora"]["corpus"]["tokens"] > found["bpe-400"]["corpora"]["corpus"]["tokens"]
    code, out, _ = call(monkeypatch, capsys, "compare", folder, "--corpus", shutil.__file__)
    assert code == 0 and "Bytes per token" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to compare"),
        (["--vocab-sizes", "a,b"], "whole numbers"),
        (["nowhere"], "no such file"),
        (["--train-on", "x"], "--vocab-sizes"),
    ],
)
def test_compare_refuses(monkeypatch, capsys, arguments: list[str], message: str):
    code, _, error = call(monkeypatch, capsys, "compare", *arguments)
    assert code == 2 and message in error


def test_compare_with_a_model(monkeypatch, capsys, bpe: Tokenizer, tmp_path):
    from headspring.inference import LanguageModel
    from headspring.models import Attention, Block, Decoder, SwiGLU

    block = Block(mixer=Attention(heads=2, kv_heads=1), feedforward=SwiGLU(hidden=16))
    model = Decoder(vocab=bpe.vocab_size, width=16, layers=(block, block), context=96).build()
    LanguageModel(model, bpe).save(tmp_path)
    code, out, _ = call(monkeypatch, capsys, "compare", tmp_path, "--model", tmp_path, "--corpus", shutil.__file__, "--json")
    found = json.loads(out)
    assert code == 0 and found["trailing_space"]["pairs"] > 50
    assert found["shape"] | {"layers": 2, "width": 16, "kv_heads": 1, "head_dim": 8, "context": 96} == found["shape"]


@pytest.mark.parametrize("verb", ["train", "explain", "compare"])
def test_help_has_an_example(monkeypatch, capsys, verb: str):
    code, out, _ = call(monkeypatch, capsys, verb, "--help")
    assert code == 0 and "Example: headspring tokens" in out
