"""Tokenizers inside GGUF files: the ids of the file they came from, typed as every other, and what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as LibraryTokenizer

from headspring.artifacts import HeadspringError, UserError
from headspring.artifacts.gguf import GgufFile, write_gguf
from headspring.tokenization import Tokenizer, TokenizerConfig, train_tokenizer
from headspring.tokenization.formats.gguf import ALIASES, GPT2, PRE, WHOLE, from_metadata, to_metadata
from tests.tokenization.test_formats import SENTENCES, sentencepiece_model

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONVERSATION = [{"role": "user", "content": "hi <|im_end|> there"}]
TEXTS = [*SENTENCES, "it's 12345 they'LL  pay\r\n\r\n\t$99.99 ½ x²", "<|im_start|>system", "a<sep>b <sep>"]


@pytest.fixture(scope="module", params=PRE)
def byte_level(request, texts) -> tuple[str, Tokenizer]:
    """A byte-level BPE as the family of each name has it, with control tokens and an ordinary added one."""
    return request.param, trained(texts, PRE[request.param])


def trained(texts, pre, steps=None) -> Tokenizer:
    library = LibraryTokenizer(models.BPE(ignore_merges=pre.ignore_merges))
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence(steps or [*cuts, last])
    if pre.nfc:
        library.normalizer = normalizers.NFC()
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator([text[:20000] for text in texts], trainer)
    library.add_tokens([AddedToken("<sep>", special=False, normalized=False)])
    return Tokenizer(library, "<|im_start|>", "<|im_end|>", "<|endoftext|>", chat_template=CHATML, add_bos=False)


def through_a_file(tokenizer: Tokenizer, folder, extra: int = 0) -> Tokenizer:
    write_gguf(folder / "a.gguf", to_metadata(tokenizer, tokenizer.vocab_size + extra), [])
    return Tokenizer.load(folder / "a.gguf")


def assert_same(one: Tokenizer, other: Tokenizer) -> None:
    for text in TEXTS:
        assert one.encode(text) == other.encode(text), text
        assert one.decode(one.encode(text)) == other.decode(one.encode(text))
    assert one.control == other.control and one.vocab_size == other.vocab_size
    assert (one.bos_id, one.eos_id, one.pad_id, one.end_id) == (other.bos_id, other.eos_id, other.pad_id, other.end_id)
    assert (one.template, one.add_bos) == (other.template, other.add_bos)


def test_byte_level(byte_level, tmp_path):
    name, tokenizer = byte_level
    metadata = to_metadata(tokenizer, tokenizer.vocab_size + 5)
    assert metadata["tokenizer.ggml.pre"] == name and WHOLE not in metadata
    assert len(metadata["tokenizer.ggml.tokens"]) == tokenizer.vocab_size + 5  # llama.cpp wants one for every row
    back = through_a_file(tokenizer, tmp_path, extra=5)
    assert_same(back, tokenizer)
    asked = back.render(CONVERSATION, add_generation_prompt=True)
    assert asked.ids.tolist() == tokenizer.render(CONVERSATION, add_generation_prompt=True).ids.tolist()
    assert asked.ids.tolist().count(back.control["<|im_end|>"]) == 1  # the template's, not the one that was typed


def test_the_names_are_not_interchangeable(texts):
    """The control: each name cuts some text differently from every other, and only a right name gives the right ids."""
    tokenizers = {name: from_metadata({**METADATA, "tokenizer.ggml.pre": name}, "x").library for name in PRE}
    pieces = {
        name: tuple(tuple(library.pre_tokenizer.pre_tokenize_str(text)) for text in TEXTS)
        for name, library in tokenizers.items()
    }
    different = {name: (cut, PRE[name].ignore_merges, PRE[name].nfc) for name, cut in pieces.items()}
    assert len(set(different.values())) == len(PRE)
    assert ALIASES.keys().isdisjoint(PRE) and set(ALIASES.values()) <= set(PRE)


def test_the_forms_of_transformers_have_names_too(texts, tmp_path):
    """Digits and ByteLevel with its own expression, as SmolLM's tokenizer.json has them, are `smollm` and nothing else."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    smollm = trained(texts, PRE["smollm"], [digits, own])
    assert to_metadata(smollm, smollm.vocab_size)["tokenizer.ggml.pre"] == "smollm"
    assert_same(through_a_file(smollm, tmp_path), smollm)
    gpt2 = trained(texts, PRE["gpt-2"], [own])
    assert to_metadata(gpt2, gpt2.vocab_size)["tokenizer.ggml.pre"] == "gpt-2"
    cut = [piece for piece, _ in pre_tokenizers.Split(Regex(GPT2), "isolated").pre_tokenize_str(TEXTS[-3])]
    assert "".join(cut) == TEXTS[-3] and len(cut) == len(own.pre_tokenize_str(TEXTS[-3]))


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_what_gguf_has_no_words_for_is_inside_whole(texts, kind, tmp_path):
    ours = train_tokenizer(texts, TokenizerConfig(kind=kind, vocab_size=700))
    metadata = to_metadata(ours, ours.vocab_size)
    assert metadata["tokenizer.ggml.model"] == "none" and "tokenizer.ggml.pre" not in metadata
    back = through_a_file(ours, tmp_path)
    assert_same(back, ours)
    assert back.render(CONVERSATION).ids.tolist() == ours.render(CONVERSATION).ids.tolist()


def test_flags_of_added_tokens_are_not_lost(texts, tmp_path):
    """The words are written for llama.cpp, and the whole beside them, where the words leave something out."""
    tokenizer = trained(texts, PRE["gpt-2"])
    tokenizer.library.add_special_tokens([AddedToken("<|tool|>", rstrip=True, special=True)])
    tokenizer = Tokenizer(tokenizer.library, chat_template=CHATML)
    metadata = to_metadata(tokenizer, tokenizer.vocab_size)
    assert metadata["tokenizer.ggml.pre"] == "gpt-2" and WHOLE in metadata
    assert through_a_file(tokenizer, tmp_path).description["added_tokens"] == tokenizer.description["added_tokens"]


SENTENCEPIECE = {"model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": False}


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(texts, prefix, tmp_path):
    options = {**SENTENCEPIECE, "normalization_rule_name": "identity", "add_dummy_prefix": prefix}
    path, theirs = sentencepiece_model(texts, tmp_path, **options)
    scores = np.array([theirs.get_score(i) for i in range(len(theirs))], "<f4")
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [theirs.id_to_piece(i) for i in range(len(theirs))],
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": np.array([kind(theirs, i) for i in range(len(theirs))], "<i4"),
        "tokenizer.ggml.bos_token_id": theirs.bos_id(),
        "tokenizer.ggml.eos_token_id": theirs.eos_id(),
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    write_gguf(tmp_path / "theirs.gguf", metadata, [])
    read = Tokenizer.load(tmp_path / "theirs.gguf")
    for text in [*TEXTS, *texts[0].splitlines()[:200]]:
        assert read.encode(text) == theirs.encode(text), text
    assert read.add_bos and read.bos_id == theirs.bos_id()
    ours = Tokenizer.load(path)
    said = to_metadata(ours, ours.vocab_size + 3)
    assert said["tokenizer.ggml.model"] == "llama" and WHOLE not in said
    assert (said["tokenizer.ggml.token_type"][:-3] == metadata["tokenizer.ggml.token_type"]).all()
    assert_same(through_a_file(ours, tmp_path, extra=3), ours)


def kind(model, i: int) -> int:
    tests = (model.is_unknown, model.is_control, model.is_byte, model.is_unused)
    return next((value for test, value in zip(tests, (2, 3, 6, 5)) if test(i)), 1)


# ---- what a prompt begins with


def test_only_a_tokenizer_that_says_so_begins_with_its_bos():
    named = {**METADATA, "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.token_type": np.array([3, 1, 1, 1], "<i4")}
    assert from_metadata(named, "x").bos_id == 0
    assert not from_metadata(named, "x").add_bos
    assert from_metadata({**named, "tokenizer.ggml.add_bos_token": True}, "x").add_bos
    assert from_metadata({**named, "tokenizer.ggml.pre": "llama-bpe"}, "x").add_bos


# ---- bad files

METADATA = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["<s>", "a", "b", "ab"],
    "tokenizer.ggml.token_type": np.array([3, 1, 1, 1], "<i4"),
    "tokenizer.ggml.merges": ["a b"],
}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"tokenizer.ggml.model": "rwkv"}, "kind 'rwkv' is not supported; gpt2 and llama are"),
        ({"tokenizer.ggml.model": "none"}, "holds no tokenizer"),
        ({"tokenizer.ggml.model": 7}, "model is no str"),
        ({"tokenizer.ggml.pre": "tekken-9"}, "'tekken-9' is not supported; .*llama-bpe.*qwen2"),
        ({"tokenizer.ggml.tokens": []}, "holds no tokens"),
        ({"tokenizer.ggml.tokens": ["a", "a", "b", "ab"]}, "a token twice"),
        ({"tokenizer.ggml.token_type": np.array([1], "<i4")}, "has 1 values for 4 tokens"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "not pairs"),
        ({"tokenizer.ggml.merges": ["a x"]}, "not a tokenizer that can be read"),
        ({"tokenizer.ggml.bos_token_id": 4}, "bos_token_id is 4, which is no token"),
        ({"tokenizer.ggml.model": "llama"}, "scores has no values"),
        ({"tokenizer.chat_template": 3}, "chat_template is no str"),
        ({WHOLE: "{"}, "not a tokenizer that can be read"),
    ],
)
def test_what_is_not_supported_is_named(changes, why, tmp_path):
    write_gguf(tmp_path / "bad.gguf", {**METADATA, **changes}, [])
    with pytest.raises(UserError, match=why) as error:
        Tokenizer.load(tmp_path / "bad.gguf")
    assert "bad.gguf" in str(error.value) and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def small_files(texts, tmp_path_factory) -> list[bytes]:
    """One file of each kind."""
    folder = tmp_path_factory.mktemp("small")
    ours = train_tokenizer([text[:3000] for text in texts], TokenizerConfig(kind="unigram", vocab_size=400))
    path, _ = sentencepiece_model(texts, folder, **SENTENCEPIECE)
    tokenizers = (trained([text[:3000] for text in texts], PRE["qwen2"]), Tokenizer.load(path), ours)
    files = []
    for tokenizer in tokenizers:
        through_a_file(tokenizer, folder)
        files.append((folder / "a.gguf").read_bytes())
    return files


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_file_is_a_damaged_file(small_files, tmp_path_factory, data):
    """Whatever bytes change: a tokenizer, or one of our errors."""
    content = bytearray(data.draw(st.sampled_from(small_files)))
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=4)):
        content[at] = value
    path = tmp_path_factory.mktemp("fuzz") / "a.gguf"
    path.write_bytes(content)
    try:
        tokenizer = Tokenizer.load(path)
        tokenizer.decode(tokenizer.encode("some words, 123 and <s>"))
    except HeadspringError as error:
        assert "a.gguf" in str(error)


def test_metadata_alone_is_no_model(tmp_path):
    write_gguf(tmp_path / "a.gguf", METADATA, [])
    assert GgufFile(tmp_path / "a.gguf").tensors == {}
    assert Tokenizer.load(tmp_path / "a.gguf").encode("ab") == [3]
