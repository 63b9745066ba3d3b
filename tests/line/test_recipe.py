"""Recipes: how they become steps, and that every mistake in one is a line that names its place."""

import pytest

from headspring.artifacts import UserError
from headspring.line.recipe import find_recipe, load_recipe
from headspring.line.source import read_source
from tests.line import toy


def load(folder, text=toy.RECIPE, overrides=()):
    return load_recipe(toy.write(folder, text), overrides, toy.STAGES)


def message(folder, text=toy.RECIPE, overrides=()):
    with pytest.raises(UserError) as caught:
        load(folder, text, overrides)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_stages_in_order_with_one_evaluation_for_each_model(tmp_path):
    recipe = load(tmp_path)
    assert [step.name for step in recipe.steps] == [
        "data", "tokenizer", "pretrain", "sft", "dpo",
        "evaluate-initial", "evaluate-pretrain", "evaluate-sft", "evaluate-dpo",
    ]  # fmt: skip
    assert str(recipe.step("evaluate-initial").inputs["model"]) == "pretrain/initial"
    assert str(recipe.step("sft").inputs["model"]) == "pretrain"
    assert str(recipe.step("dpo").inputs["model"]) == "sft"
    assert recipe.step("dpo").stage.kind == "preference"
    assert (recipe.name, recipe.seed) == ("toy", 3)


def test_the_untrained_model_is_evaluated_with_its_own_config(tmp_path):
    recipe = load(tmp_path)
    assert recipe.step("evaluate-initial").config.tasks == 0
    assert recipe.step("evaluate-pretrain").config.tasks == 3


def test_yaml_numbers_and_words_are_those_of_yaml_1_2(tmp_path):
    text = "a: 3e-4\nb: no\nc: 1:30\nd: 1_000\ne: 2024-01-01\nf: true\ng: ~\nh: -0.5\ni: 010\nj: 0x10\nk: ''\n"
    tree = read_source(toy.write(tmp_path, text)).tree
    assert tree == {"a": 3e-4, "b": "no", "c": "1:30", "d": 1000, "e": "2024-01-01", "f": True, "g": None, "h": -0.5,
                    "i": "010", "j": 16, "k": ""}  # fmt: skip


def test_kind_belongs_to_the_config_unless_it_names_a_stage(tmp_path):
    recipe = load(tmp_path, "data:\ntokenizer: {kind: unigram}\nbase: {kind: pretrain}\nsft-short: {steps: 1}\n")
    assert recipe.step("tokenizer").config.kind == "unigram"
    assert recipe.step("base").stage.kind == "pretrain"
    assert recipe.step("sft-short").stage.kind == "sft"


def test_from_chooses_an_input(tmp_path):
    recipe = load(tmp_path, toy.RECIPE.replace("dpo:\n", "dpo: {from: pretrain}\n"))
    assert str(recipe.step("dpo").inputs["model"]) == "pretrain"
    only = load(tmp_path, toy.RECIPE.replace("evaluate:\n", "evaluate: {from: sft}\n"))
    assert [step.name for step in only.steps if step.stage.kind == "evaluate"] == ["evaluate-sft"]


def test_evaluation_files_reach_the_data_stage(tmp_path):
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"prompt": "p"}\n')
    recipe = load(tmp_path, toy.RECIPE.replace("evaluate:\n", f"evaluate: {{sets: [{asked}]}}\n"))
    assert recipe.step("data").files == (asked,)
    assert recipe.step("sft").files == ()


MISTAKES = {
    "  steps: 4": {
        "  stesp: 4": "8: pretrain.stesp: unknown key; did you mean 'steps'?",
        "  zzz: 4": "8: pretrain.zzz: unknown key; valid here: optimizer, steps, stop, stop_at",
        "  steps: many": "8: pretrain.steps: input should be a valid integer",
        "  steps: -4": "8: pretrain.steps: input should be greater than or equal to 1, not -4",
        "  steps: [1]": "8: pretrain.steps: input should be a valid integer, not a list",
        "  steps: 4:": "8: not valid YAML",
        "  steps: !!python/name:os.system 4": "8: pretrain.steps: cannot read this value",
    },
    "    learning_rate: 3e-4": {
        "    learning_rat: 3e-4": "10: pretrain.optimizer.learning_rat: unknown key; did you mean 'learning_rate'?",
        "    learning_rate: .nan": "10: pretrain.optimizer.learning_rate: input should be",
    },
    "{kind: stdlib, max_bytes: 100}": {
        "{kind: stdlib, max_byte: 1}": "5: data.sources.library.max_byte: unknown key; did you mean 'max_bytes'?",
        "{kind: stdlob}": "5: data.sources.library.kind: unknown kind 'stdlob'; did you mean 'stdlib'?",
        "{kind: files}": "5: data.sources.library.path: this key is required",
    },
    "vocab_size: 300": {
        "vocab_size: -300": "6: tokenizer.vocab_size: input should be greater than 0",
        "kind: unigrm": "6: tokenizer.kind: unknown value 'unigrm'; did you mean 'unigram'?",
    },
    "pretrain:": {
        "pretrian:": "7: pretrian: unknown stage; did you mean 'pretrain'?",
        "base: {kind: pretrian}\nother:": "7: base.kind: unknown kind 'pretrian'; did you mean 'pretrain'?",
        "Pretrain:": "7: Pretrain: a stage's name is made of small letters",
    },
    "sft:": {"pretrain:": "11: pretrain: this key stands twice"},
    "seed: 3": {"seed: three": "2: seed: must be an integer between", "seed: -3": "2: seed: must be"},
    "recipe: toy": {"recipe: ../toy": "1: recipe: a recipe's name is made of"},
    "dpo:": {
        "dpo: 7": "13: dpo: a stage is a mapping",
        "dpo: {from: sftt}": "13: dpo.from: there is no stage 'sftt' above; did you mean 'sft'?",
        "dpo: {from: data}": "13: dpo.from: 'data' is of kind data; this stage takes preference, pretrain, sft",
    },
    "evaluate:": {"evaluate: {sets: [nowhere.jsonl]}": "14: evaluate: no such file: nowhere.jsonl"},
}


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [(before, after, expected) for before, cases in MISTAKES.items() for after, expected in cases.items()],
)
def test_mistakes_are_named_with_their_line(tmp_path, before, after, expected):
    assert before in toy.RECIPE
    assert f"toy.yaml:{expected}" in message(tmp_path, toy.RECIPE.replace(before, after, 1))


def test_a_stage_needs_what_it_reads_above_it(tmp_path):
    assert "toy.yaml:1: tokenizer: needs a data stage above it" in message(tmp_path, "tokenizer:\ndata:\n")
    assert "no model stage above to evaluate" in message(tmp_path, "data:\nevaluate:\n")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words\n", "recipe: empty\n"])
def test_a_file_that_is_no_recipe(tmp_path, text):
    assert "toy.yaml" in message(tmp_path, text)


def test_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"recipe: \xff\xfe\n")
    with pytest.raises(UserError, match="not UTF-8 text"):
        load_recipe(path, (), toy.STAGES)
    path.write_bytes(b"recipe: \x00\n")
    with pytest.raises(UserError, match="not valid YAML"):
        load_recipe(path, (), toy.STAGES)
    path.write_text("a: &a\n  b: *a\n")
    with pytest.raises(UserError, match="alias that contains itself"):
        load_recipe(path, (), toy.STAGES)
    with pytest.raises(UserError, match="no such recipe"):
        load_recipe(tmp_path / "missing.yaml", (), toy.STAGES)


def test_a_recipe_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    toy.write(tmp_path / "recipes")
    assert find_recipe("toy").as_posix() == "recipes/toy.yaml"
    with pytest.raises(UserError, match="did you mean 'toy'"):
        find_recipe("tou")


def test_overrides_change_values(tmp_path):
    recipe = load(tmp_path, overrides=["pretrain.steps=9", "pretrain.optimizer.learning_rate=1e-5", "seed=4", "sft={}"])
    assert recipe.step("pretrain").config.steps == 9
    assert recipe.step("pretrain").config.optimizer.learning_rate == 1e-5
    assert recipe.step("sft").config.steps == 4
    assert recipe.seed == 4


def test_overrides_reach_below_an_empty_stage_and_replace_a_mapping_by_a_path(tmp_path):
    recipe = load(tmp_path, overrides=["dpo.optimizer.learning_rate=1", "data.sources=~/my/folder"])
    assert recipe.step("dpo").config.optimizer.learning_rate == 1
    assert recipe.step("data").config.sources == "~/my/folder"


def test_overrides_from_python_are_taken_as_they_are(tmp_path):
    recipe = load(tmp_path, overrides={"pretrain.steps": 9, "data.text": "1e3"})
    assert (recipe.step("pretrain").config.steps, recipe.step("data").config.text) == (9, "1e3")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("pretrain.stesp=9", "override 'pretrain.stesp=9': pretrain.stesp: unknown key; did you mean 'steps'?"),
        ("pretrian.steps=9", "override 'pretrian.steps=9': the recipe has no stage 'pretrian'; did you mean"),
        ("pretrain.steps=-1", "override 'pretrain.steps=-1': pretrain.steps: input should be greater than or equal"),
        ("pretrain.steps", "override 'pretrain.steps': expected key=value"),
        ("pretrain.steps=[1", "override 'pretrain.steps=[1': the value is not YAML"),
        ("pretrain.steps.more=1", "override 'pretrain.steps.more=1': 'more' lies inside 4"),
        ("=1", "the recipe has no stage ''"),
    ],
)
def test_wrong_overrides_are_named(tmp_path, override, expected):
    assert expected in message(tmp_path, overrides=[override])


MEASURED = """data:
tokenizer:
tokens:
pretrain:
baselines:
  held_out: {max_bytes: 1000}
evaluate:
  held_out: {max_bytes: 1000}
"""


def test_a_yardstick_on_other_documents_than_the_models_is_refused(tmp_path):
    """With the real stages: bits per byte of xz on other bytes than the model's would stand in the report side by side."""
    path = toy.write(tmp_path, MEASURED)
    load_recipe(path)
    load_recipe(path, ["evaluate.held_out=null"])  # models that are not measured in bits
    expected = {
        "baselines.held_out.max_bytes=2000": "toy.yaml:6: baselines.held_out: baselines and evaluate would measure different",
        "evaluate.held_out.split=validation": "toy.yaml:6: baselines.held_out: baselines and evaluate would measure",
        "baselines={}": "toy.yaml:8: evaluate.held_out: baselines and evaluate would measure different documents; give both",
    }
    for override, line in expected.items():
        with pytest.raises(UserError) as caught:
            load_recipe(path, [override])
        assert line in str(caught.value) and "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_one_of_several_evaluations_is_enough_for_a_yardstick(tmp_path):
    load_recipe(toy.write(tmp_path, MEASURED + "evaluate-validation:\n  held_out: {split: validation}\n"))


def test_a_mistake_in_the_file_is_not_blamed_on_an_override(tmp_path):
    text = toy.RECIPE.replace("  steps: 4", "  stesp: 4")
    assert "toy.yaml:8: pretrain.stesp" in message(tmp_path, text, ["pretrain.stop_at=1"])
