"""Duplicates against brute force, and the word hashes they stand on."""

import random
import re
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headspring.data.deduplication import (
    DeduplicationConfig,
    UnionFind,
    band_keys,
    content_hash,
    near_duplicates,
    similarity,
)
from headspring.data.word_hashes import gram_hashes, word_hashes, words_of

CONFIG = DeduplicationConfig()
VOCABULARY = [f"word{n}" for n in range(5000)]


def shingles(text, n=5):
    words = re.findall(r"[^\W_]+", text.lower())
    return {tuple(words[i : i + n]) for i in range(max(len(words) - n + 1, 1))} if words else set()


def brute_jaccard(first, second):
    a, b = shingles(first), shingles(second)
    return len(a & b) / len(a | b) if a | b else 0.0


def clusters(texts, config=CONFIG):
    keys, has_words = band_keys(texts, config)
    assert has_words.all()
    return [cluster.members for cluster in near_duplicates(keys, texts.__getitem__, config)]


def corpus(seed=0, families=30, words=120):
    """Families of texts: an original and copies with a growing number of changed words."""
    choose = random.Random(seed)
    texts = []
    for _ in range(families):
        original = choose.choices(VOCABULARY, k=words)
        for changes in (0, 1, 2, 3, 6, 20):
            copy = list(original)
            for place in choose.sample(range(words), changes):
                copy[place] = choose.choice(VOCABULARY)
            texts.append(" ".join(copy))
    return texts


def test_no_false_positive_and_nearly_all_true_ones():
    texts = corpus()
    found = UnionFind(len(texts))
    for members in clusters(texts):
        for member in members[1:]:
            found.union(members[0], member)
    truth = UnionFind(len(texts))
    for first, second in combinations(range(len(texts)), 2):
        if brute_jaccard(texts[first], texts[second]) >= 0.7:
            truth.union(first, second)
    for members in found.sets():
        assert len({truth.root(member) for member in members}) == 1  # the Jaccard check lets nothing else through
    pairs = sum(len(members) - 1 for members in truth.sets())
    missed = pairs - sum(len(members) - 1 for members in found.sets())
    assert pairs >= 90 and missed <= 0.1 * pairs


def test_without_the_check_there_would_be_false_positives():
    """The control: with a threshold near zero every pair that shares a band is joined, true or not."""
    texts = corpus(words=40)
    loose = clusters(texts, DeduplicationConfig(threshold=0.01))
    pairs = [(members[0], member) for members in loose for member in members[1:]]
    assert any(brute_jaccard(texts[a], texts[b]) < 0.7 for a, b in pairs)


def test_similarity_is_the_true_jaccard():
    texts = corpus(families=3)
    for first, second in combinations(texts, 2):
        assert similarity(first, second, CONFIG) == pytest.approx(brute_jaccard(first, second))


def test_the_first_document_survives_and_batches_do_not_matter():
    texts = corpus(families=8)
    together = clusters(texts)
    assert all(members == sorted(members) for members in together) and len(together) >= 8
    keys = np.concatenate([band_keys([text], CONFIG)[0] for text in texts])
    assert np.array_equal(keys, band_keys(texts, CONFIG)[0])
    reversed_ = [sorted(len(texts) - 1 - member for member in members) for members in clusters(texts[::-1])]
    assert sorted(reversed_) == sorted(together)


def test_a_bucket_of_many_equal_texts_is_linear():
    looked_up = []
    texts = ["the same seven words in every text"] * 3000
    keys, _ = band_keys(texts, CONFIG)

    def text(index):
        looked_up.append(index)
        return texts[index]

    assert [cluster.members for cluster in near_duplicates(keys, text, CONFIG)] == [list(range(3000))]
    assert len(looked_up) <= 3001


@given(st.lists(st.text(max_size=60), max_size=6), st.integers(1, 6))
def test_grams_of_a_batch_are_the_grams_of_each_text(texts, n):
    batch = gram_hashes(texts, n)
    for index, text in enumerate(texts):
        assert np.array_equal(batch.of(index), gram_hashes([text], n).hashes)


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), min_size=1, max_size=30))
def test_words_are_equal_exactly_when_their_hashes_are(words):
    text = " ".join(words)
    expected = words_of(text).split()
    hashes = word_hashes([text]).hashes.tolist()
    assert len(hashes) == len(expected)
    assert len(set(hashes)) == len(set(expected)) == len(set(zip(expected, hashes, strict=True)))


def test_grams_see_order_case_and_punctuation_as_they_should():
    def grams(text):
        return set(gram_hashes([text], 3).hashes.tolist())

    assert grams("One, two: THREE!") == grams("one two three")
    assert grams("three two one") != grams("one two three")
    assert grams("one two") != grams("one two three")
    assert grams("Größe und GRÖSSE, Straße") == grams("größe und grösse straße")
    assert len(gram_hashes(["我们在北京大学"], 3).hashes) == 5  # characters of unspaced scripts are words
    assert len(gram_hashes(["!!! --- ..."], 3).hashes) == 0


def test_hashes_are_the_same_in_every_process():
    code = "from headspring.data.word_hashes import *; print(gram_hashes(['a fixed text, for ever'], 3).hashes.tolist())"
    outputs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=None).stdout
        for _ in range(2)
    }
    assert outputs == {f"{gram_hashes(['a fixed text, for ever'], 3).hashes.tolist()}\n"}


def test_content_hash_ignores_white_space_and_composition_only():
    assert content_hash("a  b\r\nc") == content_hash("a b c ") != content_hash("a b C")
    assert content_hash("e\u0301") == content_hash("é")
