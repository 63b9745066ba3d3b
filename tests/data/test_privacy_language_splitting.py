"""Masks, languages and splits."""

from collections import Counter

import pytest

from headspring.artifacts import UserError
from headspring.data.deduplication import Cluster
from headspring.data.language import LanguageConfig, check_languages, declared, identify
from headspring.data.privacy import mask
from headspring.data.splitting import SplitConfig, assign_splits, smallest_working_fraction, split_of


@pytest.mark.parametrize(("text", "masked"), [
    ("write to jane.doe+x@mail.uni-bonn.de, please", "write to <email>, please"),
    ("root@8.8.8.8 and 2001:4860:4860::8888.", "root@<ip address> and <ip address>."),
    ("key = 'AKIAABCDEFGHIJKLMNOP'", "key = '<key>'"),
    ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", "<key>"),
    ("ghp_" + "a1" * 18 + " sk-" + "b2" * 12, "<key> <key>"),
])  # fmt: skip
def test_masks(text, masked):
    result, counts = mask(text, ["email", "ip", "key"])
    assert result == masked and sum(counts.values()) == masked.count("<")


@pytest.mark.parametrize("text", [
    "me@example.com", "127.0.0.1", "192.168.1.7", "10.0.0.1", "version 1.2.3", "1.2.3.4.5", "at 12:30:45", "@property",
    "999.1.1.1", "std::vector::iterator", "a[1::2]", "::1", "sk-learn", "fe80::1",
])  # fmt: skip
def test_what_identifies_nobody_stays(text):
    assert mask(text, ["email", "ip", "key"]) == (text, {})


def test_only_what_is_asked_for_is_masked():
    assert mask("a@b.de 8.8.8.8", ["ip"]) == ("a@b.de <ip address>", {"ip": 1})
    assert mask("a@b.de 8.8.8.8", []) == ("a@b.de 8.8.8.8", {})


def test_languages():
    german, english = "Das ist ein ganz gewöhnlicher deutscher Satz über das Wetter.", "This is an ordinary English sentence."
    assert identify(german)[0] == "de" and identify(english)[0] == "en"
    assert 0 <= identify("")[1] <= 1
    assert declared("pt_BR") == ("pt", 1.0) and declared(None) is None
    assert LanguageConfig.model_validate(["en", "de"]).keep == ["en", "de"]
    with pytest.raises(UserError, match="'english' is not one of the codes"):
        check_languages(LanguageConfig(keep=["english"]))


def test_fractions_hold_on_average_and_the_seed_matters():
    config = SplitConfig(validation=0.1, test=0.2)
    splits = [split_of(f"file{n}", 0, config) for n in range(20_000)]
    share = {name: count / 20_000 for name, count in Counter(splits).items()}
    assert share == pytest.approx({"train": 0.7, "validation": 0.1, "test": 0.2}, abs=0.015)
    assert splits != [split_of(f"file{n}", 1, config) for n in range(20_000)]


def test_groups_and_clusters_are_never_separated():
    groups = [f"file{n // 3}" for n in range(300)]
    clusters = [Cluster([n, n + 30, n + 61]) for n in range(0, 60, 7)]
    splits = assign_splits(groups, clusters, 0, SplitConfig(validation=0.3, test=0.3))
    for group in set(groups):
        assert len({splits[n] for n in range(300) if groups[n] == group}) == 1
    assert all(len({splits[n] for n in cluster.members}) == 1 for cluster in clusters)
    alone = assign_splits(groups, [], 0, SplitConfig(validation=0.3, test=0.3))
    assert any(len({alone[n] for n in cluster.members}) > 1 for cluster in clusters)  # the control


def test_other_documents_do_not_change_a_split():
    groups = [f"file{n}" for n in range(100)]
    config = SplitConfig(validation=0.2, test=0.2)
    assert assign_splits(groups, [], 0, config)[:50] == assign_splits(groups[:50], [], 0, config)


def test_the_advice_works():
    groups = [f"file{n}" for n in range(12)]
    fraction = smallest_working_fraction(groups, [], range(12), 0)
    assert fraction is not None
    splits = assign_splits(groups, [], 0, SplitConfig(validation=fraction, test=fraction))
    assert set(splits) == {"train", "validation", "test"}
    assert smallest_working_fraction(groups[:2], [], range(2), 0) is None


def test_splits_must_leave_something():
    with pytest.raises(ValueError, match="leave nothing to train on"):
        SplitConfig(validation=0.5, test=0.5)
