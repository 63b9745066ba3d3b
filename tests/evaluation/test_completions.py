"""What counts as the generated body, and when it parses."""

import pytest

from headspring.evaluation.completions import body_of, complete, headers, parses

HEADER = "    def area(self, width):"


@pytest.mark.parametrize(
    ("continuation", "finished", "body"),
    [
        ("        return width\n\n    def next(self):\n        x = (", False, "        return width"),  # a dedent ends it
        ("        a = 1\n        return wid", False, "        a = 1"),  # the unfinished last line is taken off
        ("        a = 1\n        return wid", True, "        a = 1\n        return wid"),  # the model chose to end here
        ("        return wid", False, None),  # nothing finished: undecided
        ("        a = 1\n        if a:\n            b = 2\n            c", False, "        a = 1"),  # with all below it
        ("        a = 1\n        x = [\n            1,\n        ]", False, "        a = 1"),  # a bracket belongs above
        ("        a = 1\n        if a:\n            b\n        else:\n            c", False, "        a = 1"),
        ("        # only words\n    x = 1\n", False, "        # only words"),
        (
            "\n\n        return 1\n# a note at the margin\n        more()\nx",
            True,
            "\n\n        return 1\n# a note at the margin\n        more()",
        ),
        ("", True, ""),
        ("", False, None),
    ],
)
def test_body(continuation, finished, body):
    assert body_of("\n" + continuation, HEADER, finished) == (None if body is None else "\n" + body)


@pytest.mark.parametrize(
    ("continuation", "finished", "body"),
    [
        (" return width\nx = 1", False, " return width"),
        (" return wid", False, None),
        (" return wid", True, " return wid"),
        ("  # a note\n        return 1\n\n    x = 1", False, "  # a note\n        return 1"),
    ],
)
def test_body_behind_the_colon(continuation, finished, body):
    assert body_of(continuation, HEADER, finished) == body


@pytest.mark.parametrize(
    ("body", "good"),
    [
        ("        return width * 2", True),
        ("        if width:\n            return 1\n        return 2", True),
        ("        return width *", False),
        ("        if width:", False),
        ("", False),
        ("        # only words", False),
        ("        x = 1\n          y = 2", False),
        ("    return width", False),  # not deeper than the def
        ("        x = '\0'", False),
    ],
)
def test_parses(body, good):
    assert parses(HEADER, "\n" + body) is good


def test_one_line_functions_parse():
    assert parses(HEADER, " return width") and not parses(HEADER, " return (")


def test_headers_come_from_many_modules(documents):
    found = headers(documents, 10, seed=3)
    assert len({header.document_id for header in found}) == 10
    assert found == headers(list(reversed(documents)), 10, seed=3) != headers(documents, 10, seed=4)
    assert len(headers(documents, 10_000)) == 30 * 2 + 2
    for header in found:
        assert header.prompt.endswith(header.line) and header.line.lstrip().startswith("def ")


def test_originals_parse(documents):
    """The judge accepts what people wrote: everything below each header, as if a model had written it."""
    texts = {document.id: document.text for document in documents}
    for header in headers(documents, 1000):
        rest = texts[header.document_id][len(header.prompt) :]
        assert parses(header.line, body_of(rest, header.line, finished=True))


def test_complete_reads_the_end_of_long_prompts(lm):
    long = "# a line of words that fills the context\n" * 200 + "def f():"
    near, far = complete(lm, [long[-1500:], long], max_tokens=5)
    assert near == far
    other = complete(lm, [long.replace("def f", "def other_name")], max_tokens=5)[0]
    assert other != near  # it is the end that was read
