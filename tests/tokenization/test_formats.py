"""Files of other projects give the ids those projects give."""

import io
import json

import pytest
import sentencepiece
from transformers import BertTokenizer, GPT2Tokenizer

from headspring.artifacts import UserError
from headspring.tokenization import Tokenizer, TokenizerConfig, train_tokenizer

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "  two  spaces and\na line break\tand a tab ",
    "Crème brûlée, Ärger, ﬁne ligatures and ½ of it",
    "日本語 and 🙂 emoji, 1234567 numbers",
    "def parse(self, argument=None): return self._get_values(action, arg_strings)",
    "",
    "</s><s><unk><0x41>",
]


def sentencepiece_model(texts: list[str], folder, **options):
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines[:2500]),
        model_writer=model,
        vocab_size=800,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path, sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},
        {"model_type": "bpe"},
        {"model_type": "unigram", "byte_fallback": True, "normalization_rule_name": "identity"},
        {"model_type": "bpe", "byte_fallback": True, "split_digits": True, "remove_extra_whitespaces": False},
        {"model_type": "unigram", "add_dummy_prefix": False, "user_defined_symbols": ["<sep>"]},
        {"model_type": "bpe", "pad_id": 3, "allow_whitespace_only_pieces": True, "remove_extra_whitespaces": False},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_sentencepiece(texts: list[str], tmp_path, options: dict):
    path, theirs = sentencepiece_model(texts, tmp_path, **options)
    ours = Tokenizer.load(path)
    assert ours.vocab_size == theirs.get_piece_size()
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_id(), theirs.eos_id())
    for text in [*SENTENCES, *texts[0].splitlines()[:300]]:
        assert ours.encode(text) == theirs.encode(text), text
        if theirs.unk_id() not in theirs.encode(text):
            assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))


def test_sentencepiece_survives_saving(texts: list[str], tmp_path):
    path, _ = sentencepiece_model(texts, tmp_path, model_type="unigram")
    ours = Tokenizer.load(path)
    ours.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert again.encode(SENTENCES[2]) == ours.encode(SENTENCES[2]) and again.eos_id == ours.eos_id


@pytest.mark.parametrize("kind", ["word", "char"])
def test_other_sentencepiece_types_are_refused(texts: list[str], tmp_path, kind: str):
    path, _ = sentencepiece_model(texts, tmp_path, model_type=kind, hard_vocab_limit=False)
    with pytest.raises(UserError, match="only unigram and bpe"):
        Tokenizer.load(path)


@pytest.mark.parametrize("lowercase", [True, False])
def test_bert_vocabulary(texts: list[str], tmp_path, lowercase: bool):
    source = [text.lower() for text in texts] if lowercase else texts
    model = train_tokenizer(source, TokenizerConfig(kind="wordpiece", vocab_size=1000)).description["model"]
    pieces = [p for p, _ in sorted(model["vocab"].items(), key=lambda item: item[1]) if p != "[UNK]"]
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]) + "\n", encoding="utf-8")
    ours = Tokenizer.load(tmp_path)
    theirs = BertTokenizer(vocab=str(path), do_lower_case=lowercase)
    assert set(ours.control) == {"[PAD]", "[CLS]", "[SEP]", "[MASK]"}
    for text in [*SENTENCES, *texts[0].splitlines()[:200]]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


def gpt2_files(texts: list[str], folder) -> None:
    model = train_tokenizer(texts, TokenizerConfig(vocab_size=900)).description["model"]
    vocab = {**model["vocab"], "<|endoftext|>": len(model["vocab"])}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    merges = [" ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def test_gpt2_files(texts: list[str], tmp_path):
    gpt2_files(texts, tmp_path)
    ours = Tokenizer.load(tmp_path)
    theirs = GPT2Tokenizer(vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt"))
    for text in [*SENTENCES, texts[0][:5000]]:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text
    assert ours.eos_id == theirs.eos_token_id
    assert ours.eos_id not in ours.encode("<|endoftext|>")


def test_merges_alone(texts: list[str], tmp_path):
    gpt2_files(texts, tmp_path)
    (tmp_path / "vocab.json").unlink()
    ours = Tokenizer.load(tmp_path / "merges.txt")
    assert ours.token_bytes(0) == b"!" and ours.decode(ours.encode(SENTENCES[3])) == SENTENCES[3]


def test_a_run_resolves_to_its_tokenizer_stage(bpe: Tokenizer, tmp_path):
    stage = tmp_path / "words"
    bpe.save(stage)
    with pytest.raises(UserError, match="finished tokenizer stage"):
        Tokenizer.load(tmp_path)
    (stage / "manifest.json").write_text('{"kind": "tokenizer"}')
    assert Tokenizer.load(tmp_path).vocab_size == bpe.vocab_size


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b'{"model": {"type": "Nothing"}}'),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.model", b"not a protobuf"),
        ("tokenizer.model", b""),
        ("vocab.txt", b"a\nb\n"),
        ("vocab.txt", b"[UNK]\na\na\n"),
        ("vocab.txt", b"\xff"),
        ("merges.txt", b"a b c\n"),
        ("merges.txt", "▁ a\n".encode()),
        ("vocab.json", b"{}"),
        ("weights.bin", b"x"),
    ],
)
def test_bad_files_are_named(tmp_path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        Tokenizer.load(tmp_path / name)
    assert name.removeprefix("vocab").split(".")[0] in str(error.value) and "\n" not in str(error.value)


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        Tokenizer.load(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no tokenizer"):
        Tokenizer.load(tmp_path)
