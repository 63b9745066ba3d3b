"""`where` is the exact inverse of `sample`: through dedup, mixture, epochs, shuffle and packing."""

import tempfile
from collections import defaultdict

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headspring.data.mixture import Interleaving, Mixture
from headspring.data.packing import PackedTokens
from headspring.data.permutation import Permutation
from headspring.data.store import Row
from headspring.tokenization.train import TokenizerConfig, train_tokenizer
from tests.data.corpora import ByteTokenizer, WordTokenizer, corpus, document, make_shards, rows


def check_inverse(data, documents, tokenizer):
    """Every input of every sample is covered by exactly one visit, of the document whose bytes it is; and no more."""
    owners = defaultdict(list)
    for one in documents:
        ids, spans = tokenizer.encode_with_spans(one.text)
        visits = data.where(one.id)
        assert visits == sorted(visits, key=lambda visit: (visit.sample, visit.start))
        for visit in visits:
            positions = range(visit.start, visit.end)
            for position in positions:
                owners[visit.sample, position].append(one.id)
            run = data.sample(visit.sample).inputs[visit.start : visit.end].tolist()
            inside = [i for i, (a, b) in zip(ids, spans) if visit.byte_start <= a and b <= visit.byte_end]
            assert inside == [token for token in run if token >= 3], "exactly the tokens of these bytes"
            origins = [data.origin(visit.sample, position) for position in positions]
            assert {name for name, _, _ in origins} == {one.id}
            written = [(start, end) for _, start, end in origins if start < end] or [origins[0][1:]]
            assert (visit.byte_start, visit.byte_end) == (written[0][0], written[-1][1])
    for index in range(data.num_samples):
        for position, token in enumerate(data.sample(index).inputs.tolist()):
            is_padding = token == (tokenizer.pad_id or 0)  # the plain tokenizers never use 0
            assert len(owners.pop((index, position), ())) == (0 if is_padding else 1)
    assert not owners, "a visit outside every sample"


lengths = st.lists(st.integers(0, 25), min_size=1, max_size=6)


@given(
    lengths,
    lengths,
    st.integers(2, 12),
    st.sampled_from(["concat", "best_fit"]),
    st.floats(0.1, 3.0),
    st.booleans(),
    st.integers(0, 5),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_where_is_the_inverse_of_sample(first, second, T, packing, epochs, staged, seed):
    documents = [*corpus([*first, 20], "a"), *corpus([*second, 20], "b", "zyxwé ")]
    weights = {"a": 1, "b": 2} if staged else None
    curriculum = [{"until": 0.5, "weights": {"a": 3, "b": 1}}] if staged else []
    with tempfile.TemporaryDirectory() as folder:
        shards = make_shards(folder, rows(documents))
        epoch = len(PackedTokens(shards, "train", T, packing=packing))
        mixture = Mixture(weights=weights, curriculum=curriculum)
        data = PackedTokens(shards, "train", T, mixture, seed, packing, int(epochs * epoch))
        check_inverse(data, documents, ByteTokenizer())


@given(lengths, st.integers(2, 12))
@settings(max_examples=20, deadline=None)
def test_in_one_epoch_the_visits_are_the_whole_document(lengths, T):
    documents = corpus(lengths)
    with tempfile.TemporaryDirectory() as folder:
        data = PackedTokens(make_shards(folder, rows(documents)), "train", T, packing="best_fit")
        for one in documents:
            visits, size = data.where(one.id), len(one.text.encode())
            assert sum(visit.end - visit.start for visit in visits) == size + 2, "bos and eos belong to it"
            assert sorted(n for visit in visits for n in range(visit.byte_start, visit.byte_end)) == list(range(size))


TOKENIZERS = [ByteTokenizer(), ByteTokenizer(control=False), WordTokenizer()]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["bytes", "bytes_without_control", "words"])
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_where_for_other_tokenizers(tmp_path, tokenizer, packing):
    documents = [document(text) for text in ("one two  three four five six", "  seven", "eight nine", "x", " ten")]
    data = PackedTokens(make_shards(tmp_path, rows(documents), tokenizer), "train", 4, packing=packing, num_samples=20)
    check_inverse(data, documents, tokenizer)


def test_a_visit_is_a_slice_of_the_text(tmp_path):
    text = "Größe und Maß: naïve café, 東京"
    data = PackedTokens(make_shards(tmp_path, rows([document(text)])), "train", 7)
    [one] = {visit.sample: visit for visit in data.where(document(text).id) if visit.byte_start == 6}.values()
    run = data.sample(one.sample).inputs[one.start : one.end].tolist()
    assert b"".join(map(ByteTokenizer().token_bytes, run)) == text.encode()[one.byte_start : one.byte_end]


def test_control_tokens_belong_to_their_document_and_have_no_bytes(tmp_path):
    documents = [document("abc"), document("defghi")]  # | b a b c e | b d e f g | h i e
    data = PackedTokens(make_shards(tmp_path, rows(documents)), "train", 4)
    visits = {(visit.start, visit.end, visit.byte_start, visit.byte_end) for visit in data.where(documents[0].id)}
    assert visits == {(0, 4, 0, 3), (0, 1, 3, 3)}  # b a b c, then e alone at the head of the next row


def test_a_removed_duplicate_has_its_survivors_visits(tmp_path):
    kept, copy, other, spam = (document(text) for text in ("the kept one", "the kept  one", "other words", "spam"))
    removed = [Row(copy, None, "near_duplicate", survivor=kept.id), Row(spam, None, "rule", "why")]
    shards = make_shards(tmp_path, [*rows([kept, other]), *removed])
    data = PackedTokens(shards, "train", 5, num_samples=12)
    assert data.where(copy.id) == data.where(kept.id) != []
    assert data.where(copy.id) != data.where(other.id)
    assert data.where(spam.id) == data.where("0" * 32) == []
    shards.__dict__["duplicates"] = {}  # control: without the map the duplicate is lost
    assert data.where(copy.id) == []


def test_other_splits_and_sources_without_weight_have_no_visits(tmp_path):
    kept, unused, held_out = corpus([20], "a"), corpus([20], "b", "xyz"), corpus([20], "a", "mnop")
    shards = make_shards(tmp_path, [*rows([*kept, *unused]), *rows(held_out, "validation")])
    data = PackedTokens(shards, "train", 5, Mixture(weights={"a": 1}), num_samples=12)
    assert data.where(kept[0].id) and not data.where(unused[0].id) and not data.where(held_out[0].id)


def test_a_document_is_seen_once_an_epoch(tmp_path):
    documents = corpus([10, 20, 30, 40])
    shards = make_shards(tmp_path, rows(documents))
    epoch = len(PackedTokens(shards, "train", 8))
    data = PackedTokens(shards, "train", 8, num_samples=5 * epoch)
    for one in documents:
        visits = data.where(one.id)
        for n in range(5):
            in_epoch = [visit for visit in visits if n * epoch <= visit.sample < (n + 1) * epoch]
            assert len(in_epoch) == len(visits) / 5


PLANTED = {
    "shuffle not undone": (Permutation, "inverse", lambda self, element: element),
    "mixture off by one": (Interleaving, "index", lambda self, source, j: j),
    "same order every epoch": (PackedTokens, "samples_of", lambda self, source, row: [row]),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_the_check_notices_planted_bugs(tmp_path, monkeypatch, bug):
    documents = [*corpus([30, 40, 20], "a"), *corpus([35, 25], "b", "zyxw")]
    data = PackedTokens(make_shards(tmp_path, rows(documents)), "train", 8, num_samples=40)
    check_inverse(data, documents, ByteTokenizer())
    monkeypatch.setattr(*PLANTED[bug])
    with pytest.raises(AssertionError):
        check_inverse(data, documents, ByteTokenizer())


def test_where_with_the_tokenizer_of_the_line(tmp_path):
    """Through byte-level BPE: the tokens of every visit are, byte for byte, the slice of the text it names."""
    texts = [f"def größe_{n}(x):\n    return x * {n}  # 東京 {'ab' * n}\n" for n in range(30)]
    tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=300))
    documents = [document(text) for text in texts]
    shards = make_shards(tmp_path, rows(documents), tokenizer)
    shards.check_tokenizer(tokenizer)
    for packing in ("concat", "best_fit"):
        data = PackedTokens(shards, "train", 24, seed=1, packing=packing)
        for one in documents:
            pieces = {}
            for visit in data.where(one.id):
                run = data.sample(visit.sample).inputs[visit.start : visit.end].tolist()
                text = b"".join(tokenizer.token_bytes(i) for i in run if i not in tokenizer.control.values())
                assert text == one.text.encode()[visit.byte_start : visit.byte_end]
                pieces[visit.byte_start, visit.byte_end] = text
            if packing == "best_fit":
                assert b"".join(pieces[span] for span in sorted(pieces)) == one.text.encode()
