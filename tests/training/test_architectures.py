"""Every family from a recipe: its usual numbers, five steps (or one counting), text; and whole value trees."""

from pathlib import Path

import numpy as np
import pytest
import torch

from headspring.artifacts import UserError
from headspring.data.packing import PackedTokens
from headspring.inference.language_model import LanguageModel
from headspring.line.plan import plan
from headspring.line.recipe import load_recipe
from headspring.line.run import run
from headspring.models import Attention, Block, Decoder, SwiGLU, repeat
from headspring.models.families import FAMILIES
from headspring.training import counting, loop
from headspring.training.architectures import TREES, Architecture, Transformer
from headspring.training.heads import LayerSkip
from headspring.training.objective import NextToken
from headspring.training.pretrain import PretrainConfig, pretrain
from tests.data.corpora import corpus, make_shards, rows
from tests.training.conftest import Stream, config

SMALL = {"width": 32, "depth": 2, "heads": 2, "head_dim": 32}
OBJECTIVES = {"encoder": "masked", "encoder_decoder": "spans", "vaswani": "spans", "headed": "multi_token"}
RECIPE = """recipe: families
data:
  sources: {{topics: {{kind: topics, max_documents: 60}}}}
  split: {{validation: 0.1, test: 0.1}}
tokenizer: {{vocab_size: 400, mask: true, sentinels: 4}}
tokens:
pretrain:
  model: {model}
  objective: {objective}
  steps: 5
  batch_size: 2
  validation_samples: 2
"""
ROOT = Path(__file__).parents[2]


def recipe(model: dict | str, objective: str = "next_token") -> str:
    """A recipe's text. What is counted takes no word on how to train."""
    counted = isinstance(model, dict) and model.get("kind") == "ngram"
    return RECIPE.format(model=model, objective=objective) + ("" if counted else "  precision: fp32\n")


def small(kind: str) -> dict:
    """The preset with the numbers of `SMALL` that it has."""
    fields = Architecture.kinds[kind].model_fields
    chosen = {name: value for name, value in SMALL.items() if name in fields}
    if kind in TREES:
        mask = {"kind": "full" if kind == "encoder" else "causal"}
        attention = {"kind": "attention", "heads": 2, "mask": mask}
        chosen["layers"] = [{"mixer": attention}, {"mixer": attention, "feedforward": {"kind": "mlp", "hidden": 40}}]
    if kind == "headed":
        return {"kind": kind, "body": small("transformer"), "ahead": 2}
    return {"kind": kind, "context": 64, **chosen}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A run with data, tokenizer and tokens."""
    folder = tmp_path_factory.mktemp("families")
    path = folder / "families.yaml"
    path.write_text(recipe(small("transformer")))
    run(path, run_dir=folder / "run", until="tokens", quiet=True)
    return folder


@pytest.mark.parametrize("kind", sorted(Architecture.kinds))
def test_a_recipe_trains_it_and_it_writes(kind, prepared, tmp_path):
    objective = OBJECTIVES.get(kind, "next_token")
    path = tmp_path / "families.yaml"
    path.write_text(recipe(small(kind), objective))
    settings = load_recipe(path).step("pretrain").config
    metrics = pretrain(settings, prepared / "run" / "tokens", prepared / "run" / "tokenizer", tmp_path / "out")
    assert metrics["validation_after"]["loss"] < metrics["validation_before"]["loss"]
    lm = LanguageModel.load(tmp_path / "out")
    assert metrics["parameters"] == lm.model.num_parameters() == lm.model.ledger().parameters
    if objective == "masked":
        assert len(lm.embed(["def f():"])[0]) == 32
    else:
        assert lm.generate(["The"], max_tokens=4, seed=0)[0].text


def test_the_default_is_the_transformer_it_always_was():
    block = Block(mixer=Attention(heads=4, kv_heads=2), feedforward=SwiGLU(hidden=704))
    expected = Decoder(vocab=300, width=256, layers=repeat(6, block), context=512)
    assert PretrainConfig(model={"kv_heads": 2}).described(300) == expected
    assert PretrainConfig().model == Transformer()


@pytest.mark.parametrize("name", [name for name, tiny in FAMILIES.items() if tiny().kind in TREES])
def test_every_family_is_a_tree_without_its_vocabulary(name):
    value = FAMILIES[name]()
    tree = Architecture.choose(value.model_dump(mode="json", exclude={"vocab"}))
    assert (tree.decoder(53) if value.causal else tree.encoder(53)) == value
    assert Architecture.choose(tree.model_dump(mode="json")) == tree


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("{widht: 3}", "pretrain.model.widht: unknown key; did you mean 'width'?"),
        ("{kind: lstm, dept: 3}", "pretrain.model.dept: unknown key; did you mean 'depth'?"),
        ("{kind: lstn}", "pretrain.model: no kind 'lstn'; the nearest are: lstm"),
        ("{feedforward: {kind: moe, expert: 3}}", "pretrain.model.feedforward.expert: unknown key; did you mean 'experts'?"),
        (
            "{kind: decoder, width: 8, layers: [{mixer: {kind: mamba, stat: 2}}]}",
            "stat: unknown key; did you mean 'state'",
        ),
        ("{kind: hybrid, pattern: XA}", "pattern 'XA' uses ['X']"),
        ("{width: 30}", "width (30) must be a multiple of heads (4)"),
        ("{kind: lstm, context: 0}", "pretrain.model.context: input should be greater than 0"),
        ("{theta: 5, position: {kind: alibi}}", "theta is that of the default RoPE"),
    ],
)
def test_mistakes_are_named_with_their_line(model, message, tmp_path):
    (tmp_path / "families.yaml").write_text(recipe(model))
    with pytest.raises(UserError) as caught:
        load_recipe(tmp_path / "families.yaml")
    assert message in str(caught.value) and "\n" not in str(caught.value) and caught.value.exit_code == 2
    line = 7 if "heads (4)" in message else 8  # one is found when everything is put together
    assert f"families.yaml:{line}: " in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "objective", "message"), [("lstm", "masked", "reads one way"), ("encoder", "next_token", "sees both")]
)
def test_a_family_that_cannot_have_the_objective_is_refused(kind, objective, message):
    with pytest.raises(UserError, match=message):
        PretrainConfig(model=small(kind), objective=objective)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model": {"kind": "headed"}}, "belong together"),
        ({"objective": "multi_token"}, "belong together"),
        ({"model": {"kind": "headed", "body": {"kind": "ngram"}}, "objective": "multi_token"}, "takes no heads"),
        ({"model": {"kind": "headed", "context": 7}, "objective": "multi_token"}, "is that of body"),
        ({"model": {"depth": 1}, "objective": "layer_skip"}, "two layers at least"),
        ({"model": {"kind": "ngram"}, "objective": "layer_skip"}, "two layers at least"),
        ({"layer_skip": {}}, "layer_skip belongs to objective: layer_skip"),
        ({"multi_token": {}}, "multi_token belongs to objective: multi_token"),
    ],
)
def test_heads_and_their_objectives_belong_together(config, message):
    with pytest.raises((UserError, ValueError), match=message):
        PretrainConfig.model_validate(config)


def test_a_recipe_teaches_every_layer_to_be_the_last(prepared, tmp_path):
    path = tmp_path / "families.yaml"
    path.write_text(recipe(small("transformer"), "layer_skip") + "  layer_skip: {dropout: 0.0, exit_scale: 1.0}\n")
    settings = load_recipe(path).step("pretrain").config
    assert isinstance(settings.minimised(), LayerSkip) and vars(settings.minimised()) == {"dropout": 0.0, "exit_scale": 1.0}
    metrics = pretrain(settings, prepared / "run" / "tokens", prepared / "run" / "tokenizer", tmp_path / "out")
    assert metrics["validation_after"]["loss"] < metrics["validation_before"]["loss"]


@pytest.mark.parametrize(
    "key",
    ["optimizer: {kind: adamw}", "precision: bf16", "schedule: {kind: cosine}", "minutes: 3", "keep_steps: [3]",
     "balancing: {}", "device: cpu"],
)  # fmt: skip
def test_what_is_counted_takes_no_word_on_training(key, tmp_path):
    path = tmp_path / "families.yaml"
    path.write_text(recipe(small("ngram")) + f"  {key}\n")
    with pytest.raises(UserError, match=f"{key.partition(':')[0]} says how to train, and a model of kind 'ngram' is counted"):
        load_recipe(path)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "families").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_of_families_can_be_built(path):
    recipe = load_recipe(path)
    model = recipe.step("pretrain").config.described(recipe.step("tokenizer").config.vocab_size)
    with torch.device("meta"):
        assert model.module().ledger().parameters
    assert recipe.name == path.stem and recipe.description


def test_the_plan_knows_the_parameters_of_the_ledger(prepared):
    path = prepared / "families.yaml"
    for kind in ("ngram", "hybrid"):
        path.write_text(recipe(small(kind)))
        row = next(row for row in plan(path, run_dir=prepared / "run").stages if row.stage == "pretrain")
        model = PretrainConfig(model=small(kind)).described(400).build()
        assert row.estimate.parameters == model.ledger().parameters and row.estimate.seconds > 0


# ---- counting


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_counting_reads_what_the_samples_show(packing, tmp_path):
    shards = make_shards(tmp_path, rows(corpus([30, 5, 80, 41, 2])))
    whole = PackedTokens(shards, "train", 16, packing=packing, num_samples=60)  # several epochs
    table, tokens = shards.documents("train", "a"), shards.tokens("train", "a")
    read = sum(layout.num_rows * 16 for layout in whole.layouts.values()) if packing == "concat" else len(tokens)
    expected = [np.asarray(tokens[a : min(b, read)]) for a, b in zip(table.token_start, table.token_end) if a < read]
    found = counting.seen_documents(whole)
    assert len(found) == len(expected) and all(map(np.array_equal, found, expected))
    few = PackedTokens(shards, "train", 16, packing="concat", num_samples=2)
    assert sum(map(len, counting.seen_documents(few))) == 32


def test_what_is_counted_is_not_trained(tmp_path, stream: Stream):
    model = FAMILIES["ngram"]().build()
    with pytest.raises(UserError, match="'ngram' learns by counting"):
        loop.train(model, NextToken(), stream, config(), tmp_path)


def test_kneser_ney_needs_a_token_that_begins_documents():
    value = Architecture.choose({"kind": "ngram"}).decoder(50)
    assert counting.begun(value, 7).bos == 7
    with pytest.raises(UserError, match="stupid_backoff"):
        counting.begun(value, None)
    assert counting.begun(value.model_copy(update={"smoothing": "stupid_backoff"}), None).bos is None
