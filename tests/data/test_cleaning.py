"""Each rule against the paper's sentence, and the fast n-gram measures against the obvious slow ones."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headspring.artifacts import UserError
from headspring.data.cleaning import PROFILES, bounds_of, clean, drop_lines, score_columns
from headspring.data.cleaning_rules import MEASURES, Analysis
from headspring.data.privacy import mask
from headspring.text.documents import Document
from headspring.text.sources import Files

SENTENCES = [
    "The house that we have seen stands with its back to the river, and nobody can say who built it.",
    "Every summer the children of the village go to look for the old boat under the bridge.",
    "It is said to be a gift of the miller, who wanted to have a view over the valley.",
    "In winter, when the snow lies deep, one can hear the wind in the broken windows.",
    "Those are the stories with which my grandmother made the long evenings shorter.",
    "She would stop in the middle of a sentence and ask us what we thought would happen next.",
]
PROSE = " ".join(SENTENCES)


def judge(text, profile="prose", **rules):
    source = Files(paths=["x"], rules={name.replace("__", "."): bound for name, bound in rules.items()})
    kind = "code" if profile == "code" else "prose"
    return clean(Document(text, "s", kind, "p"), profile, bounds_of(source, profile, "s"))


def test_good_prose_passes_every_profile_for_prose_with_all_scores():
    for profile in ("prose", "web", "docstring", "none"):
        verdict = judge(PROSE, profile)
        assert verdict.decision is None, verdict.reason
        assert set(PROFILES[profile]) <= set(verdict.scores)


@pytest.mark.parametrize(("text", "rule"), [
    (" ".join(PROSE.split()[:40]), "gopher.words"),
    (PROSE.replace(" ", "extremely long, so that the words grow"[:14].replace(" ", ""), 80), "gopher.mean_word_length"),
    (PROSE + " # " * 15, "gopher.hashes_per_word"),
    (PROSE.replace(" the ", " … "), "gopher.ellipses_per_word"),
    ("\n".join("- " + sentence for sentence in SENTENCES), "gopher.bullet_lines"),
    ("\n".join(sentence + "..." * (n % 2) for n, sentence in enumerate(SENTENCES)), "gopher.ellipsis_lines"),
    (PROSE + " 1 22 333 4444" * 12, "gopher.alphabetic_words"),
    (" ".join(word for word in PROSE.split() if word.lower() not in ("the", "be", "to", "of", "and", "that", "have", "with")),
     "gopher.stop_words"),
    (PROSE + "\n" + "\n".join(SENTENCES[:1] * 4), "gopher_repetition.duplicate_lines"),
    (PROSE + "\n\n" + "\n\n".join(SENTENCES[:1] * 4), "gopher_repetition.duplicate_paragraphs"),
    (PROSE + " and so on" * 40, "gopher_repetition.top_3_gram"),
    (PROSE + " lorem ipsum dolor", "c4.lorem_ipsum"),
    (PROSE.replace(".", ","), "c4.sentences"),
    ("\n".join(sentence[:-1] for sentence in SENTENCES * 2), "gopher_repetition.duplicate_lines"),
    ("\n".join(sentence[:-1] for sentence in SENTENCES), "fineweb.terminal_punctuation_lines"),
])  # fmt: skip
def test_a_text_that_breaks_one_rule_is_removed_with_its_name_and_score(text, rule):
    only = {name.replace(".", "__"): None for name in PROFILES["prose"] if name != rule}
    verdict = judge(text, **only)
    assert verdict.decision == rule, (verdict, MEASURES[rule](Analysis(text)))
    assert verdict.reason.startswith(f"{rule} {verdict.scores[rule]:.4g} ")


def test_scores_by_hand():
    a = Analysis('# Title ...\n\n- one two\n• three\nOne. Two! "Three?" four\nOne. Two! "Three?" four\n')
    expected = {
        "gopher.words": 2 + 12 - 2, "gopher.hashes_per_word": 1 / 16, "gopher.ellipses_per_word": 1 / 16,
        "gopher.bullet_lines": 2 / 6, "gopher.ellipsis_lines": 1 / 6, "c4.sentences": 3 + 4 + 4,
        "fineweb.terminal_punctuation_lines": 1 / 5, "fineweb.short_lines": 1.0, "fineweb.newlines_per_word": 6 / 16,
        "gopher_repetition.duplicate_line_characters": 23 / 81,
    }  # fmt: skip
    words = len(a.text.split())
    assert MEASURES["gopher.bullet_lines"](a) == expected["gopher.bullet_lines"]
    assert MEASURES["gopher.ellipsis_lines"](a) == expected["gopher.ellipsis_lines"]
    assert MEASURES["c4.sentences"](a) == expected["c4.sentences"]
    assert MEASURES["fineweb.terminal_punctuation_lines"](a) == expected["fineweb.terminal_punctuation_lines"]
    assert MEASURES["fineweb.newlines_per_word"](a) == 6 / words
    assert MEASURES["gopher.hashes_per_word"](a) == 1 / words
    assert MEASURES["gopher.words"](a) == words - 4  # "#", "...", "-" and "•" are symbols
    line = len('One. Two! "Three?" four')
    assert MEASURES["gopher_repetition.duplicate_line_characters"](a) == line / len(a.text)
    assert MEASURES["fineweb.duplicate_line_characters"](a) == line / (len(a.text) - 6)


def slow_top(words, n):
    grams = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
    if not grams:
        return 0
    gram, count = Counter(grams).most_common(1)[0]
    return len(gram) * count if count > 1 else 0


def slow_repeated(words, n):
    seen, characters, i = set(), 0, 0
    while i <= len(words) - n:
        gram = tuple(words[i : i + n])
        if gram in seen:
            characters += sum(map(len, gram))
            i += n
        else:
            seen.add(gram)
            i += 1
    return characters


@given(st.lists(st.sampled_from(["a", "bb", "ccc", "d"]), max_size=60))
def test_ngram_shares_equal_the_slow_definition(words):
    text = " ".join(words)
    shares = Analysis(text).ngram_shares
    for n in (2, 3, 4):
        assert shares[n] == pytest.approx(slow_top(words, n) / max(len(text), 1))
    for n in range(5, 11):
        assert shares[n] == pytest.approx(slow_repeated(words, n) / max(len(text), 1))


def test_the_slow_definition_notices_a_planted_bug():
    words = ["a", "b", "c", "d", "e"] * 4
    overlapping = sum(5 for i in range(1, 16) if i >= 5)  # counting overlaps, which the paper does not
    assert slow_repeated(words, 5) != overlapping
    assert Analysis(" ".join(words)).ngram_shares[5] * len(" ".join(words)) == slow_repeated(words, 5)


@pytest.mark.parametrize(("text", "rule"), [
    ("x = '" + "ab " * 400 + "'\n" + "y = 1\n" * 50, "code.longest_line"),
    ("\n".join("call(" + "argument, " * 15 + ")" for _ in range(5)), "code.mean_line_length"),
    ("((((((((((((((((((((((((1))))))))))))\n", "code.alphanumeric"),
    ("# AUTO-GENERATED by a tool\nx = 1\n", "code.generated"),
])  # fmt: skip
def test_code_rules(text, rule):
    assert judge(text, "code").decision == rule


def test_prose_rules_never_run_on_code():
    code = "def f(x):\n    return {x: '#' * 80}\n" * 20  # fails nearly every prose rule
    verdict = judge(code, "code")
    assert verdict.decision is None and all(name.startswith("code.") for name in verdict.scores)
    assert judge(code, "prose").decision is not None
    assert not any(rule.startswith(("gopher", "c4", "fineweb")) for rule in PROFILES["code"])


def test_web_drops_lines_and_prose_does_not():
    lines = [*SENTENCES, "Menu", "Please enable JavaScript to go on.", "We use cookies on this page.", "Known since 1900.[3]"]
    text = "\n".join(lines)
    assert judge(text, "prose").text == text
    kept, share = drop_lines(text)
    assert kept.split("\n") == [*SENTENCES, "Known since 1900."] and share == pytest.approx(3 / 10)
    assert judge(text, "web").text == kept and judge(text + "\n{}", "web").decision == "c4.curly_brackets"


def test_rules_can_be_changed_and_switched_off_but_not_invented():
    short = SENTENCES[0]
    assert judge(short, "prose").decision == "gopher.words"
    assert judge(short, "prose", gopher__words=(5, None), c4__sentences=None).decision is None
    assert judge(short, "none", gopher__words=(50, None)).decision == "gopher.words"
    with pytest.raises(UserError, match=r"no cleaning rule 'gopher.word'; did you mean 'gopher.words'"):
        judge(short, gopher__word=(5, None))


@pytest.mark.parametrize("text", ["", " \n\t", "\u3000"])
def test_nothing_is_empty(text):
    assert judge(text, "none").decision == "empty"


@given(st.text(max_size=200))
def test_no_text_breaks_a_rule(text):
    analysis = Analysis(text)
    assert all(isinstance(measure(analysis), float) for measure in MEASURES.values())


@pytest.mark.parametrize("text", ["." * 1_000_000 + "a", "a" * 1_000_000, "a." * 500_000, "\n" * 1_000_000 + "a"])
def test_no_rule_is_quadratic(text):
    """A quadratic rule would take hours here, and the suite's time limit would name this test."""
    analysis = Analysis(text)
    assert all(measure(analysis) >= 0 for measure in MEASURES.values())
    assert mask(text, ["email", "ip", "key"]) == (text, {})


def test_every_rule_has_a_column():
    assert set(score_columns({})) >= {rule for bounds in PROFILES.values() for rule in bounds}
