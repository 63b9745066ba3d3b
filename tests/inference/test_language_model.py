"""Loading, chatting, scoring and looking inside."""

import time

import pytest
import torch

from headspring.artifacts import CorruptArtifact, UserError
from headspring.artifacts.files import write_json
from headspring.artifacts.manifest import Manifest, write_manifest
from headspring.inference import LanguageModel, loading
from headspring.models import save_model
from headspring.text.chat import Message

from .tiny import CONTEXT, tiny_model


@pytest.fixture
def folder(lm, tmp_path):
    lm.save(tmp_path / "model")
    return tmp_path / "model"


def add_stage(run, tokenizer, name: str, kind: str, seed: int, finished: bool = True):
    (run / name).mkdir(parents=True)
    save_model(tiny_model(tokenizer.vocab_size, seed), run / name)
    tokenizer.save(run / name)
    if finished:
        write_manifest(run / name, Manifest(name=name, kind=kind, revision=1, config={}, created=time.time() - seed))


def first_weight(lm) -> float:
    return lm.model.embed.weight[0, 0].item()


# -- loading


def test_a_saved_model_comes_back_bit_for_bit(lm, folder):
    again = LanguageModel.load(folder)
    assert again.config == lm.config and again.kind is None
    for one, other in zip(lm.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert again.generate("def", max_tokens=8, seed=1) == lm.generate("def", max_tokens=8, seed=1)


def test_a_run_is_its_last_finished_model_stage(tokenizer, tmp_path):
    run = tmp_path / "run"
    for seed, (name, kind) in enumerate((("base", "pretrain"), ("sft", "sft"), ("dpo", "preference")), start=1):
        add_stage(run, tokenizer, name, kind, seed, finished=name != "dpo")
    add_stage(run, tokenizer, "evaluate", "evaluate", 9)
    base = LanguageModel.load(run)  # without run.json: by creation, and `created` falls as the seed grows
    assert base.kind == "pretrain" and first_weight(base) == first_weight(LanguageModel.load(run / "base"))
    write_json(run / "run.json", {"stages": ["data", "base", "sft", "dpo", "evaluate"]})
    tuned = LanguageModel.load(run)
    assert tuned.kind == "sft" and first_weight(tuned) == first_weight(LanguageModel.load(run / "sft"))


def test_dtype(folder):
    for name in ("bfloat16", "bf16", torch.bfloat16):
        small = LanguageModel.load(folder, dtype=name)
        assert small.model.embed.weight.dtype == small.model.compute_dtype == torch.bfloat16
        assert small.logits([[1, 2]]).dtype == torch.float32
        assert len(small.generate("def", max_tokens=5, temperature=0.0)[0].token_ids) == 5
    wide = LanguageModel.load(folder)
    assert wide.model.compute_dtype == torch.float32
    torch.testing.assert_close(small.logits([[1, 2]]), wide.logits([[1, 2]]), atol=0.5, rtol=0.1)


def test_what_is_stored_in_bfloat16_stays_so(lm, folder):
    LanguageModel.load(folder, dtype="bfloat16").save(folder)
    assert LanguageModel.load(folder).model.compute_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("path", "options", "says"),
    [
        ("nowhere", {}, "no such folder"),
        ("/nowhere/at/all", {}, "no such folder"),
        ("model.gguf", {}, "no such folder"),
        ("file", {}, "is a file"),
        ("empty", {}, "holds no model"),
        ("unfinished", {}, "no finished model stage yet"),
        ("model", {"quantize": "int3"}, "int3"),
        ("model", {"dtype": "int3"}, "dtype 'int3'"),
        ("model", {"device": "abacus"}, "device 'abacus'"),
        ("model", {"device": "meta"}, "device 'meta'"),
        ("model", {"device": "cuda:77"}, "device 'cuda:77'"),
        ("model", {"revision": "main"}, "revision='main' belongs to a hub name"),
    ],
    ids=str,
)
def test_bad_input_is_refused_in_one_line(folder, monkeypatch, path, options, says):
    monkeypatch.chdir(folder.parent)
    (folder.parent / "file").write_text("x")
    (folder.parent / "empty").mkdir()
    write_json(folder.parent / "unfinished" / "run.json", {"stages": ["pretrain"]})
    with pytest.raises(UserError, match=says) as caught:
        LanguageModel.load(path, **options)
    assert "\n" not in str(caught.value)


def test_a_damaged_model_is_noticed(folder):
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CorruptArtifact, match=r"model\.safetensors"):
        LanguageModel.load(folder)


def test_a_hub_name_is_asked_for_at_its_revision(folder, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: asked.append((a, k)) or str(folder))
    assert LanguageModel.load("some-org/some-model", revision="v2").context == CONTEXT
    assert asked[0][0] == ("some-org/some-model",) and asked[0][1]["revision"] == "v2"


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no route to host\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(UserError, match=r"some-org/some-model.*no route") as caught:
        LanguageModel.load("some-org/some-model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "hub"), [("a/b", True), ("a", False), ("./a", False), ("~/a", False), ("/a", False)])
def test_hub_names(name, hub):
    assert loading.looks_like_hub_name(name) is hub


def test_a_tokenizer_that_does_not_fit_is_refused(tokenizer):
    with pytest.raises(UserError, match="not a pair"):
        LanguageModel(tiny_model(tokenizer.vocab_size - 1), tokenizer)


# -- chatting


def test_chat_is_generate_of_the_rendered_conversation(lm):
    messages = [Message(role="system", content="be brief"), {"role": "user", "content": "hi <|end|>"}]
    rendered = lm.tokenizer.render(messages, add_generation_prompt=True).ids.tolist()
    answer = lm.chat(messages, max_tokens=9, seed=1)
    assert answer == lm.generate([rendered], max_tokens=9, seed=1)[0]
    assert answer.prompt_token_ids == rendered
    assert "".join(lm.chat_stream(messages, max_tokens=9, seed=1)) == answer.text
    assert rendered.count(lm.tokenizer.end_id) == 2  # what the user typed is not a control token


def test_chat_stops_at_the_end_token(lm):
    end = lm.tokenizer.end_id

    def only_end(hidden):
        return 100 * lm.model.embed.weight[end].expand_as(hidden)

    with lm.intervene({"final": only_end}):
        answer = lm.chat([{"role": "user", "content": "hi"}], temperature=0.0)
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("", [end], "stop")


def test_a_batch_of_conversations(lm):
    conversations = [[{"role": "user", "content": text}] for text in ("a", "longer question", "b")]
    answers = lm.chat_batch(conversations, max_tokens=6, temperature=0.0, n=2)
    alone = [lm.chat(messages, max_tokens=6, temperature=0.0).token_ids for messages in conversations]
    assert [answer.token_ids for answer in answers[::2]] == alone


def test_a_base_model_warns_before_it_chats(lm):
    base = LanguageModel(lm.model, lm.tokenizer, kind="pretrain")
    with pytest.warns(UserWarning, match="base model"):
        assert base.chat([{"role": "user", "content": "hi"}], max_tokens=2).token_ids


@pytest.mark.parametrize("messages", [[], [{"role": "wizard", "content": "x"}], [{"role": "user"}]], ids=str)
def test_bad_conversations_are_refused(lm, messages):
    with pytest.raises(UserError):
        lm.chat(messages)


# -- measuring


def test_log_probs_are_those_of_the_logits(lm):
    texts = ["def add", "", "the quick brown fox 🙂", "x"]
    for text, scores in zip(texts, lm.logprobs(texts, batch_size=3), strict=True):
        ids = torch.tensor(lm.prompt_ids(text))
        expected = lm.logits(ids)[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        assert scores.shape == (len(lm.tokenizer.encode(text)),)
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)


def test_log_probs_refuse_what_does_not_fit(lm):
    assert lm.logprobs([[1] * (CONTEXT + 1)])[0].shape == (CONTEXT,)
    with pytest.raises(UserError, match="windows"):
        lm.logprobs([[1] * (CONTEXT + 2)])


def test_logits_carry_gradients(lm):
    lm.logits([[1, 2, 3]]).sum().backward()
    assert lm.model.embed.weight.grad is not None
    lm.model.zero_grad(set_to_none=True)


# -- looking inside


def test_capture_and_intervene(lm):
    sites = ["layers.1.residual.post", "layers.0.attention.out"]
    seen = lm.capture("the quick", sites)
    length = len(lm.prompt_ids("the quick"))
    assert list(seen) == sites or set(seen) == set(sites)
    assert seen["layers.1.residual.post"].shape == (1, length, 32)
    before = lm.generate("the", max_tokens=8, temperature=0.0)[0]
    with lm.intervene({"layers.0.mixer.out": torch.zeros_like}):
        assert lm.generate("the", max_tokens=8, temperature=0.0)[0].token_ids != before.token_ids
    assert lm.generate("the", max_tokens=8, temperature=0.0)[0] == before


def test_unknown_sites_are_refused(lm):
    with pytest.raises(UserError, match="did you mean"):
        lm.capture("x", ["layers.0.residual.pots"])
