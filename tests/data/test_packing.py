"""Packing against the obvious reference: lists of documents, one token at a time."""

import hashlib
import pickle
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headspring.artifacts import UserError
from headspring.data.batch import IGNORE
from headspring.data.layout import BestFit, Concatenated
from headspring.data.mixture import Mixture
from headspring.data.packing import PackedTokens
from tests.data.corpora import ByteTokenizer, corpus, document, make_shards, rows

PAD = 9_999_999
PACKINGS = ["concat", "best_fit"]


def stream_of(lengths):
    """A stream in which every token is its own position, and where its documents start."""
    return np.arange(sum(lengths), dtype=np.uint32), np.cumsum([0, *lengths[:-1]])


def build(layout, lengths, T):
    tokens, starts = stream_of(lengths)
    return Concatenated(tokens, starts, T) if layout == "concat" else BestFit(tokens, starts, T, PAD)


def check_layout(layout, lengths, T):
    """Every token but the cropped is an input exactly once; targets are what follows it in its own document."""
    starts = np.cumsum([0, *lengths])
    owner = np.repeat(np.arange(len(lengths)), lengths)
    seen, trained, padded = [], 0, 0
    for row in range(layout.num_rows):
        sample = layout.sample(row)
        assert [array.shape for array in (sample.inputs, sample.targets, sample.segments)] == [(T,)] * 3
        assert [array.dtype for array in (sample.inputs, sample.targets, sample.segments)] == [np.int64] * 2 + [np.int32]
        owners = [-1 if token == PAD else owner[token] for token in sample.inputs]
        changes = [0, *np.cumsum([a != b for a, b in pairwise(owners)])]
        assert sample.segments.tolist() == changes, "segments number the documents from 0"
        for column, (token, target) in enumerate(zip(sample.inputs.tolist(), sample.targets.tolist())):
            at = layout.token_at(row, column)
            if token == PAD:
                padded += 1
                assert target == IGNORE and at is None
                continue
            assert at == token
            seen.append(token)
            ends_document = token + 1 in starts
            assert target == (IGNORE if ends_document else token + 1)
            trained += target != IGNORE
    cropped = set(range(sum(lengths))) - set(seen)
    assert len(seen) == len(set(seen))
    ledger = layout.ledger()
    assert ledger["tokens"] == sum(lengths) == ledger["inputs"] + ledger["cropped"]
    assert ledger["positions"] == layout.num_rows * T == ledger["inputs"] + ledger["padded"]
    assert ledger["inputs"] == len(seen) == ledger["trained"] + ledger["last_of_document"]
    assert (ledger["cropped"], ledger["trained"], ledger["padded"]) == (len(cropped), trained, padded)
    return cropped


def check_runs(layout, lengths):
    """`runs` of every document are its inputs, no more and no less."""
    starts = np.cumsum([0, *lengths])
    covered = 0
    for start, end in pairwise(starts):
        for run in layout.runs(int(start), int(end)):
            tokens = layout.sample(run.row).inputs[run.column : run.column + run.end - run.start]
            assert tokens.tolist() == list(range(run.start, run.end)) and start <= run.start < run.end <= end
            covered += run.end - run.start
    assert covered == layout.ledger()["inputs"]


many_lengths = st.lists(st.integers(1, 30), min_size=1, max_size=40)


@given(many_lengths, st.integers(1, 17))
def test_concat_loses_only_the_last_partial_row(lengths, T):
    layout = build("concat", lengths, T)
    cropped = check_layout(layout, lengths, T)
    assert cropped == set(range(sum(lengths) // T * T, sum(lengths)))
    check_runs(layout, lengths)


@given(many_lengths, st.integers(1, 17))
def test_best_fit_loses_nothing_and_cuts_only_what_does_not_fit(lengths, T):
    layout = build("best_fit", lengths, T)
    assert check_layout(layout, lengths, T) == set()
    check_runs(layout, lengths)
    starts = np.cumsum([0, *lengths])
    for start, end in zip(starts.tolist(), starts[1:].tolist()):
        assert len(layout.runs(start, end)) == -(-(end - start) // T)
    # two rows that are at most half full would have been one
    used = [int((layout.sample(row).inputs != PAD).sum()) for row in range(layout.num_rows)]
    assert sum(2 * filled <= T for filled in used) <= 1


def test_best_fit_takes_the_tightest_row():
    layout = build("best_fit", [6, 5, 3, 2, 4], 8)  # 6+2, 5+3, 4
    packed = {tuple(token for token in layout.sample(row).inputs.tolist() if token != PAD) for row in range(3)}
    assert packed == {(*range(6), 14, 15), (*range(6, 11), 11, 12, 13), (16, 17, 18, 19)}


def test_windows_do_not_mix(monkeypatch):
    monkeypatch.setattr("headspring.data.layout.WINDOW", 3)
    lengths = [5, 3, 7, 2, 8, 1, 4, 20, 2]
    layout = build("best_fit", lengths, 8)
    assert check_layout(layout, lengths, 8) == set()
    check_runs(layout, lengths)


class PredictsAcross(Concatenated):
    """A planted bug: the first token of a document is predicted from the one before."""

    def sample(self, row):
        sample = super().sample(row)
        sample.targets[:-1] = sample.inputs[1:]
        return sample


class ForgetsTheOffset(BestFit):
    """A planted bug: runs are reported one column late."""

    def runs(self, start, end):
        return [run._replace(column=run.column + 1) for run in super().runs(start, end)]


def test_the_checks_notice_planted_bugs():
    lengths = [4, 3, 6]
    tokens, starts = stream_of(lengths)
    with pytest.raises(AssertionError):
        check_layout(PredictsAcross(tokens, starts, 5), lengths, 5)
    with pytest.raises(AssertionError):
        check_runs(ForgetsTheOffset(tokens, starts, 6, PAD), lengths)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    documents = [
        *corpus([30, 1, 200, 55, 90, 12, 64], "code"),
        *corpus([20, 140, 31, 7], "prose", "zyxwvé "),
        *corpus([100], "tiny"),
    ]
    held_out = rows(corpus([70, 80], "code", "mnopqr"), "validation")
    return make_shards(tmp_path_factory.mktemp("shards"), [*rows(documents), *held_out])


def digest(samples):
    whole = hashlib.sha256()
    for sample in samples:
        for array in (sample.inputs, sample.targets, sample.segments):
            whole.update(array.tobytes())
    return whole.hexdigest()


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_stream_is_the_same_for_every_number_of_ranks_and_threads(shards, packing):
    mixture = Mixture(curriculum=[{"until": 0.4, "weights": {"code": 1}}], weights={"code": 1, "prose": 2.5})
    data = PackedTokens(shards, "train", 16, mixture, seed=3, packing=packing, num_samples=160)
    alone = digest(data.sample(i) for i in range(160))
    for world in (1, 2, 4, 8):
        ranks = [PackedTokens(shards, "train", 16, mixture, 3, packing, 160) for _ in range(world)]
        assert digest(ranks[i % world].sample(i) for i in range(160)) == alone
    with ThreadPoolExecutor(4) as pool:
        assert digest(pool.map(data.sample, range(160), chunksize=7)) == alone
    assert digest(pickle.loads(pickle.dumps(data)).sample(i) for i in range(160)) == alone
    backwards = [data.sample(i) for i in reversed(range(160))]
    assert digest(reversed(backwards)) == alone, "a sample does not depend on those before it"
    for other in (
        PackedTokens(shards, "train", 16, mixture, 4, packing, 160),
        PackedTokens(shards, "train", 16, None, 3, packing, 160),
    ):
        assert digest(other.sample(i) for i in range(160)) != alone, "control: the digest tells streams apart"


@pytest.mark.parametrize("packing", PACKINGS)
def test_one_epoch_is_every_row_once_and_the_next_in_another_order(shards, packing):
    one = PackedTokens(shards, "train", 16, packing=packing)
    rows_once = [(source, row) for source, layout in one.layouts.items() for row in range(layout.num_rows)]
    assert sorted(one.row_of(i) for i in range(len(one))) == sorted(rows_once)
    three = PackedTokens(shards, "train", 16, packing=packing, num_samples=3 * len(one))
    epochs = [[three.row_of(e * len(one) + i) for i in range(len(one))] for e in range(3)]
    assert epochs[0] == [one.row_of(i) for i in range(len(one))]
    assert all(sorted(epoch) == sorted(rows_once) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_ledger_is_what_an_epoch_holds(shards, packing):
    data = PackedTokens(shards, "train", 16, packing=packing)
    trained = sum(int((data.sample(i).targets != IGNORE).sum()) for i in range(len(data)))
    ledger = data.ledger()
    assert trained == sum(entry["trained"] for entry in ledger.values())
    assert sum(entry["tokens"] for entry in ledger.values()) == shards.num_tokens("train")
    assert sum(entry["samples"] for entry in ledger.values()) == len(data)


def test_bos_is_never_predicted_and_padding_is_the_pad_token(shards):
    for packing in PACKINGS:
        data = PackedTokens(shards, "train", 16, packing=packing)
        targets = np.concatenate([data.sample(i).targets for i in range(len(data))])
        inputs = np.concatenate([data.sample(i).inputs for i in range(len(data))])
        assert 0 not in targets and 0 in inputs and 1 in targets
        assert (2 in inputs) == (packing == "best_fit") and 2 not in targets


def test_padding_without_a_pad_token(tmp_path):
    shards = make_shards(tmp_path, rows(corpus([5])), ByteTokenizer(control=False))
    assert PackedTokens(shards, "train", 16, packing="best_fit").sample(0).inputs[-1] == 0


def test_one_token_documents(tmp_path):
    shards = make_shards(tmp_path, rows(corpus([1] * 20, alphabet="abc")), ByteTokenizer(control=False))
    for packing in PACKINGS:
        data = PackedTokens(shards, "train", 4, packing=packing)
        assert all((data.sample(i).targets == IGNORE).all() for i in range(len(data)))
        assert data.sample(0).segments.tolist() == [0, 1, 2, 3]


def test_the_tree_shows_what_is_left_out(shards):
    tree = PackedTokens(shards, "train", 16, Mixture(weights={"code": 1, "tiny": 0}), num_samples=10).tree()
    assert "code  100.00%" in tree and "prose left out" in tree and "tiny  left out" in tree


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "the test split is empty"),
        ({"split": "tarin"}, "no split named 'tarin'; did you mean 'train'"),
        (
            {"sequence_length": 128},
            r"train split of source tiny has 1\d\d tokens, fewer than one sequence of 128; lower",
        ),
        ({"sequence_length": 0}, "sequence_length: 0 is too small"),
        ({"packing": "first_fit"}, "packing: 'first_fit' does not exist; use 'concat' or 'best_fit'"),
        ({"num_samples": -1}, "num_samples: -1 is negative"),
        ({"mixture": Mixture(weights={"proes": 1})}, "no source 'proes'; did you mean 'prose'"),
        ({"mixture": Mixture(weights={"proes": 0, "code": 1})}, "no source 'proes'; did you mean 'prose'"),
        (
            {"split": "validation", "mixture": Mixture(weights={"prose": 1})},
            "'prose' has no text in the validation split",
        ),
    ],
)
def test_bad_arguments(shards, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        PackedTokens(**{"shards": shards, "split": "train", "sequence_length": 16, **arguments})
    assert "\n" not in str(error.value)


def test_a_small_source_hurts_only_where_it_has_weight(shards):
    assert len(PackedTokens(shards, "train", 128, Mixture(weights={"code": 1, "tiny": 0}))) == 4
    assert len(PackedTokens(shards, "train", 128, packing="best_fit")) > 4
    validation = PackedTokens(shards, "validation", 16, Mixture(weights={"code": 1, "tiny": 0}))
    assert validation.ledger().keys() == {"code"}


@pytest.mark.parametrize("index", [-1, 10])
def test_samples_outside_the_run_do_not_exist(shards, index):
    with pytest.raises(IndexError):
        PackedTokens(shards, "train", 16, num_samples=10).sample(index)


def test_a_run_of_no_samples(shards):
    data = PackedTokens(shards, "train", 16, num_samples=0)
    assert len(data) == 0 and data.where(document("x").id) == []
