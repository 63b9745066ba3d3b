"""What quotes a test is found; boilerplate, short texts and near misses are not."""

import random

import pytest

from headspring.data.decontamination import Contamination, DecontaminationConfig, EvaluationIndex, quote

choose = random.Random(0)
WORDS = [f"{a}{b}" for a in ("ka", "lo", "mi", "ne", "pu") for b in ("ra", "so", "ti", "vu", "xe", "za")]


def words(n):
    return " ".join(choose.choices(WORDS, k=n))


def check(evaluation, training, **options):
    contamination = Contamination(EvaluationIndex.build(evaluation, DecontaminationConfig(**options)))
    contamination.add(range(len(training)), training)
    return contamination


def test_thirteen_words_are_contamination_and_twelve_are_not():
    question = words(40)
    shared = question.split()[7:20]
    quoting = f"{words(30)}. {' '.join(shared).upper()}! {words(30)}"
    near_miss = f"{words(30)} {' '.join(shared[:12])} nothing {words(30)}"
    found = check([question], [words(60), quoting, near_miss]).contaminated()
    assert list(found) == [1]
    assert quote(quoting, *found[1]).split() == shared


def test_an_ngram_in_many_documents_is_boilerplate():
    header = words(20)
    training = [f"{header} {words(20)}" for _ in range(11)]
    contamination = check([header], training)
    assert contamination.contaminated() == {} and contamination.boilerplate == 8
    assert len(check([header], training[:10]).contaminated()) == 10  # the control: at the limit it still counts


def test_short_evaluation_texts():
    short, shortest = words(9), words(3)
    contamination = check([short, shortest], [f"{words(20)} {short} {words(20)}", f"{shortest} {words(20)}"])
    assert list(contamination.contaminated()) == [0]
    assert (contamination.index.texts, contamination.index.too_short) == (2, 1)


@pytest.mark.parametrize("evaluation", [[], [""], ["..."]])
def test_nothing_to_compare_with(evaluation):
    assert check(evaluation, [words(20), ""]).contaminated() == {}


def test_grams_do_not_run_across_documents():
    question = words(13)
    first, second = question.split()[:6], question.split()[6:]
    assert check([question], [" ".join(first), " ".join(second)]).contaminated() == {}
    assert check([question], [question]).contaminated() != {}
