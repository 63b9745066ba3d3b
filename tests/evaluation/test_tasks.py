"""Answers to tasks: how they are got, judged, kept and compared."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from headspring.artifacts import UserError
from headspring.data.tasks import Task, TaskConfig, mine
from headspring.evaluation.tasks import Answer, answer_tasks, paired_difference, read_set, write_answers
from headspring.text.chat import Message


class Parrot:
    """A language model that says what a function of the prompt's text says."""

    def __init__(self, lm, say, finish="stop"):
        self.tokenizer, self.model, self.device, self.context = lm.tokenizer, lm.model, lm.device, lm.context
        self.say, self.finish, self.calls = say, finish, []

    def generate(self, prompts, **options):
        self.calls.append(options)
        return [SimpleNamespace(text=self.say(self.tokenizer.decode(p)), finish_reason=self.finish) for p in prompts]


def task(answer="yes", check="exact", question="?", choices=(), kind="name") -> Task:
    return Task(question, kind, (Message(role="user", content=question),), answer, check, "document", 0, 1, choices)


def test_right_and_wrong(lm):
    tasks = [task("yes", question="a?"), task("no", question="b?"), task("b, a", "set", "c?")]
    answers = answer_tasks(Parrot(lm, lambda prompt: "a, b" if "c" in prompt else "yes"), tasks)
    assert [answer.correct for answer in answers] == [True, False, True]
    assert [answer.expected for answer in answers] == ["yes", "no", "b, a"]


def test_an_answer_that_does_not_end_is_wrong(lm):
    assert not answer_tasks(Parrot(lm, lambda prompt: "yes", finish="length"), [task("yes")])[0].correct


def test_one_line_answers_end_with_the_line_and_code_does_not(lm):
    parrot = Parrot(lm, lambda prompt: "yes")
    answer_tasks(parrot, [task("yes"), task("def f():\n    pass", "parses", "write f")], max_tokens=40)
    assert {(call["stop"], call["max_tokens"]) for call in parrot.calls} == {(("\n",), 16), ((), 40)}


def test_prompts_longer_than_the_context_are_not_asked(lm):
    answers = answer_tasks(Parrot(lm, lambda prompt: "yes"), [task("yes", question="word " * 300), task("yes")])
    assert [answer.correct for answer in answers] == [None, True]


def test_choices_by_likelihood_per_byte(lm):
    choices = ("return words", "a much longer answer that costs more in all", "ok")
    found = answer_tasks(lm, [task(choices[0], "choice", "what?", choices)])[0].answer
    prompt = lm.tokenizer.render([Message(role="user", content="what?")], add_generation_prompt=True).ids.tolist()
    costs = {}
    for choice in choices:
        ids = lm.tokenizer.encode(choice)
        (log_probs,) = lm.logprobs([[*prompt, *ids]])
        costs[choice] = log_probs[-len(ids) :].sum().item() / len(choice.encode())
    assert found == max(costs, key=costs.get)


def test_a_real_model_answers_mined_tasks(lm, documents):
    tasks = mine(documents, TaskConfig(per_kind=3), seed=1)
    answers = answer_tasks(lm, tasks, max_tokens=12)
    assert [answer.id for answer in answers] == [t.id for t in tasks]
    assert all("\n" not in answer.answer for answer in answers if answer.kind == "name")
    assert answers == answer_tasks(lm, tasks, max_tokens=12, batch_size=2, batch_tokens=200)


def test_paired_difference(tmp_path):
    def write(name, correct):
        folder = tmp_path / name
        folder.mkdir()
        answers = [Answer(str(i), "name" if i % 2 else "returns", "d", "p", "e", "a", c) for i, c in enumerate(correct)]
        write_answers(answers, folder)
        return folder

    before, after = write("before", [False] * 40 + [True] * 10 + [None]), write("after", [True] * 30 + [False] * 20 + [True])
    mean, low, high = paired_difference(before, after)
    assert mean == pytest.approx(0.4) and low < mean < high and low > 0.1
    assert paired_difference(before, before) == (0.0, 0.0, 0.0)
    assert paired_difference(before, after, kind="name")[0] == pytest.approx(0.4)
    with pytest.raises(UserError, match="share no"):
        paired_difference(before, write("other", []))
    with pytest.raises(UserError, match=r"tasks\.jsonl"):
        paired_difference(before, tmp_path)


def test_sets(tmp_path, lm):
    path = tmp_path / "capitals.jsonl"
    rows = [
        {"prompt": "Capital of France?", "answer": "Paris"},
        {"prompt": "Capital of Peru?", "answer": "Lima", "choices": ["Lima", "Quito"]},
        {
            "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "?"}],
            "answer": "a",
            "check": "contains",
        },
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    tasks = read_set(path)
    assert [t.check for t in tasks] == ["exact", "choice", "contains"] and {t.kind for t in tasks} == {"capitals"}
    answers = answer_tasks(Parrot(lm, lambda prompt: "Paris"), [tasks[0], replace(tasks[2], answer="ari")])
    assert [a.correct for a in answers] == [True, True]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "set.jsonl:1: not a task"),
        ('{"prompt": "a"}', "set.jsonl:1: no 'answer'|no answer"),
        ('{"answer": "a"}', "no prompt"),
        ('{"prompt": "a", "answer": 3}', "must be texts"),
        ('{"prompt": "a", "answer": "b", "check": "fuzzy"}', "must be one of"),
        ('{"prompt": "a", "answer": "b", "choices": ["c"]}', "hold the answer"),
        ('{"messages": [], "answer": "b"}', "empty"),
        ('{"messages": [{"role": "god", "content": ""}], "answer": "b"}', "not a task"),
        ("[1]", "not a task"),
        ("", "holds no task"),
    ],
)
def test_bad_sets(tmp_path, line, message):
    path = tmp_path / "set.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match=message) as caught:
        read_set(path)
    assert "\n" not in str(caught.value)


def test_unreadable_sets(tmp_path):
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    for name in ("missing.jsonl", "binary.jsonl"):
        with pytest.raises(UserError, match="not a readable"):
            read_set(tmp_path / name)
