"""Token shards: what is written is what was read, token by token; damage is found and named."""

import json
import pickle

import numpy as np
import pytest

from headspring.artifacts import CorruptArtifact, UserError
from headspring.artifacts.files import sha256_file
from headspring.data.shards import TokensConfig, TokenShards, write_tokens
from headspring.data.store import Row, write_documents
from tests.data.corpora import ByteTokenizer, WordTokenizer, corpus, document, make_shards, rows


def check_every_token(shards, documents, tokenizer, split="train"):
    """Every document's tokens and spans are its encoding between bos and eos, and the streams hold nothing else."""
    total = 0
    for one in documents:
        [(found_split, source, number)] = shards.find(one.id)
        assert (found_split, source) == (split, one.source)
        table = shards.documents(split, source)
        start, end = int(table.token_start[number]), int(table.token_end[number])
        ids, spans = tokenizer.encode_with_spans(one.text)
        tokens, written = shards.tokens(split, source)[start:end], shards.spans(split, source)[start:end]
        bos, eos = ([i] if i is not None else [] for i in (tokenizer.bos_id, tokenizer.eos_id))
        size = len(one.text.encode())
        assert tokens.tolist() == [*bos, *ids.tolist(), *eos]
        assert written.tolist() == [*([0, 0] for _ in bos), *spans.tolist(), *([size, size] for _ in eos)]
        assert table.bytes[number] == size
        assert all(shards.document_at(split, source, token) == one.id for token in range(start, end))
        total += end - start
    assert total == shards.num_tokens(split)


TOKENIZERS = [ByteTokenizer(), ByteTokenizer(control=False), WordTokenizer()]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["bytes", "bytes_without_control", "words"])
def test_every_token_keeps_its_document_and_bytes(tmp_path, tokenizer):
    documents = [*corpus([5, 1, 40, 12], "code"), *corpus([3, 9], "prose", "zyxwvé ")]
    shards = make_shards(tmp_path, rows(documents), tokenizer)
    shards.verify()
    check_every_token(shards, documents, tokenizer)
    assert shards.sources("train") == ("code", "prose") and shards.sources("test") == ()
    assert shards.num_documents("train") == 6 and shards.num_documents("train", "prose") == 2
    assert shards.bytes("train") == sum(len(one.text.encode()) for one in documents)
    with pytest.raises(AssertionError):  # control: the check notices two documents that changed places
        table = shards.documents("train", "code")
        table.ids[[0, 2]] = table.ids[[2, 0]]
        table.__dict__.pop("_order")
        check_every_token(shards, documents, tokenizer)


def test_splits_removed_documents_and_duplicates(tmp_path):
    kept, copy, held_out, dropped = (document(text) for text in ("the survivor", "the survivor ", "held out", "spam"))
    shards = make_shards(
        tmp_path,
        [
            Row(dropped, None, "gopher.mean_word_length", "too short"),
            Row(held_out, "validation"),
            Row(kept, "train"),
            Row(copy, None, "near_duplicate", survivor=kept.id),
        ],
    )
    assert shards.splits == ("train", "validation")
    assert shards.duplicates == {copy.id: kept.id}
    assert shards.find(copy.id) == shards.find(kept.id) == [("train", "a", 0)]
    assert shards.find(held_out.id) == [("validation", "a", 0)]
    assert shards.find(dropped.id) == shards.find("f" * 32) == []


def test_a_document_kept_twice_is_found_twice(tmp_path):
    documents = corpus([5, 6])
    shards = make_shards(tmp_path, rows([documents[0], documents[1], documents[0]]))
    assert shards.find(documents[0].id) == [("train", "a", 0), ("train", "a", 2)]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(259, "<u2"), (65_536, "<u2"), (65_537, "<u4")])
def test_the_vocabulary_decides_the_width(tmp_path, vocab_size, dtype):
    shards = make_shards(tmp_path, rows(corpus([5])), ByteTokenizer(vocab_size=vocab_size))
    assert shards.tokens("train", "a").dtype == shards.dtype == np.dtype(dtype)
    assert shards.vocab_size == vocab_size


def test_batches_do_not_change_a_byte(tmp_path):
    documents = [*corpus(range(1, 60)), *corpus([700, 3], "b")]
    hashes = set()
    for name, batch_bytes in (("one", 1), ("some", 200), ("all", 1 << 30)):
        shards = make_shards(tmp_path / name, rows(documents), config=TokensConfig(batch_bytes=batch_bytes))
        hashes.add(sha256_file(shards.folder / "shards.json"))
    assert len(hashes) == 1


def test_metrics(tmp_path):
    write_documents(rows(corpus([4, 5], alphabet="x")), tmp_path, scores=())
    metrics = write_tokens(TokensConfig(), tmp_path, ByteTokenizer(), tmp_path / "tokens")
    assert (metrics["documents"], metrics["tokens"], metrics["bytes"], metrics["empty"]) == (2, 13, 9, 0)
    assert metrics["bytes_per_token"] == metrics["splits"]["train"]["a"]["bytes_per_token"] == 9 / 13


def test_empty_and_one_token_documents(tmp_path):
    documents = [document(text) for text in ("x", "", "yz")]
    with_control = make_shards(tmp_path / "control", rows(documents))
    assert with_control.num_tokens("train") == 3 + 2 + 4
    check_every_token(with_control, documents, ByteTokenizer())
    tokenizer = ByteTokenizer(control=False)
    without = make_shards(tmp_path / "plain", rows(documents), tokenizer)
    assert without.num_tokens("train") == 3 and without.num_documents("train") == 2
    check_every_token(without, [documents[0], documents[2]], tokenizer)


def test_nothing_kept_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no document was kept"):
        make_shards(tmp_path, [Row(document("x"), None, "rule", "why")])
    with pytest.raises(UserError, match="no finished token shards; run the tokens stage"):
        TokenShards(tmp_path / "tokens")


@pytest.mark.parametrize("source", ["../../out", "..", "a/b", "nul\u00ebl", "train"])
def test_a_source_may_have_any_name(tmp_path, source):
    shards = make_shards(tmp_path / "deep" / "er", rows(corpus([5], source)))
    shards.verify()
    assert shards.num_tokens("train", source) == shards.num_tokens("train") > 0
    assert {path.name for path in tmp_path.iterdir()} == {"deep"}
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"er"}


FILES = ["train/a/tokens.bin", "train/a/spans.bin", "train/a/documents.parquet", "duplicates.parquet"]


@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_and_named(tmp_path, name):
    shards = make_shards(tmp_path, rows(corpus([30, 20])))
    shards.verify()
    path = shards.folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptArtifact, match=f"{name}: content differs"):
        TokenShards(shards.folder).verify()
    path.write_bytes(content[:-1])
    with pytest.raises(CorruptArtifact, match=f"{name}: .* bytes, shards.json records"):
        TokenShards(shards.folder)
    path.unlink()
    with pytest.raises(CorruptArtifact, match=f"{name}: missing"):
        TokenShards(shards.folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [("{", "not an index"), ("[]", "not an index"), ("{}", "not an index"), ('{"format": 99}', "format 99, not 1")],
)
def test_a_bad_index_is_named(tmp_path, index, message):
    (tmp_path / "shards.json").write_text(index)
    with pytest.raises(UserError, match=message):
        TokenShards(tmp_path)


def test_a_write_that_fails_leaves_no_index(tmp_path):
    shards = make_shards(tmp_path, rows(corpus([30, 20])))

    class Fails(ByteTokenizer):
        def encode_batch_with_spans(self, texts):
            raise OSError("disk full")

    with pytest.raises(OSError):
        write_tokens(TokensConfig(), tmp_path / "data", Fails(), shards.folder)
    with pytest.raises(UserError, match="no finished token shards"):
        TokenShards(shards.folder)


def test_another_tokenizer_is_refused(tmp_path):
    shards = make_shards(tmp_path, rows(corpus([30])))
    shards.check_tokenizer(ByteTokenizer())
    with pytest.raises(UserError, match="another tokenizer"):
        shards.check_tokenizer(ByteTokenizer(vocab_size=300))


def test_unknown_places(tmp_path):
    shards = make_shards(tmp_path, rows(corpus([30])))
    with pytest.raises(UserError, match="train split has no source 'b'; it has a"):
        shards.tokens("train", "b")
    with pytest.raises(IndexError):
        shards.document_at("train", "a", shards.num_tokens("train"))


def test_another_process_opens_the_files_itself(tmp_path):
    shards = make_shards(tmp_path, rows(corpus([3000])))
    shards.tokens("train", "a")
    pickled = pickle.dumps(shards)
    assert len(pickled) < 500
    assert np.array_equal(pickle.loads(pickled).tokens("train", "a"), shards.tokens("train", "a"))


def test_the_index_holds_no_path_of_this_machine(tmp_path):
    shards = make_shards(tmp_path, rows(corpus([30])))
    assert str(tmp_path) not in json.dumps(json.loads((shards.folder / "shards.json").read_text()))
