"""Our DPO loss on the batches and the model of TRL's own trainer gives TRL's number."""

import os
from contextlib import nullcontext

import pytest
import torch

from headspring.posttraining.pair_data import PreferencePairs
from headspring.posttraining.pairs import Pair
from headspring.posttraining.preference import PreferenceObjective, reference_log_probs

pytestmark = pytest.mark.slow
WORDS = 60


class Borrowed(torch.nn.Module):
    """A Hugging Face Llama behind the interface of our models."""

    def __init__(self, llama):
        super().__init__()
        self.llama = llama

    def computing_in(self, dtype):
        assert dtype == torch.float32
        return nullcontext()

    device = property(lambda self: self.llama.device)
    output_weight = property(lambda self: self.llama.lm_head.weight)
    output_bias = softcap = None

    def head_input(self, hidden):
        return hidden

    def forward(self, tokens):
        return self.llama.model(tokens).last_hidden_state


@pytest.fixture(scope="module")
def trl_parts(tmp_path_factory):
    os.environ["HF_HUB_OFFLINE"] = "1"
    trl, transformers, datasets = (pytest.importorskip(name) for name in ("trl", "transformers", "datasets"))
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i + 3 for i in range(WORDS)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    rng = torch.Generator().manual_seed(0)

    def text(low, high):
        length = int(torch.randint(low, high, (1,), generator=rng))
        return " ".join(f"w{int(i)}" for i in torch.randint(0, WORDS, (length,), generator=rng))

    rows = [{"prompt": text(2, 9), "chosen": " " + text(1, 8), "rejected": " " + text(1, 8)} for _ in range(6)]

    def llama(seed):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=0, eos_token_id=1, initializer_range=0.3,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config).float()

    policy, reference = llama(1), llama(2)
    settings = trl.DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")), report_to="none", bf16=False, use_cpu=True,
        gradient_checkpointing=False, per_device_train_batch_size=6, beta=0.2, loss_type="sigmoid",
    )  # fmt: skip
    data = datasets.Dataset.from_list(rows)
    trainer = trl.DPOTrainer(model=policy, ref_model=reference, args=settings, train_dataset=data, processing_class=tokenizer)
    return trainer, policy, reference, rows, tokenizer


def test_sigmoid_dpo_equals_trl(trl_parts):
    trainer, policy, reference, rows, tokenizer = trl_parts
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    policy.eval(), reference.eval()
    expected = trainer.compute_loss(trainer.model, dict(batch)).item()

    def pair(row):
        prompt, chosen, rejected = (tuple(tokenizer(row[key])["input_ids"]) for key in ("prompt", "chosen", "rejected"))
        return Pair("", "name", "", 0, 1, prompt, (*chosen, 1), (*rejected, 1), "", "", "model")

    pairs = [pair(row) for row in rows]
    values = reference_log_probs(Borrowed(reference), pairs, 0, "fp32")
    data = PreferencePairs(pairs, values, 0, 64)
    ours = data.collate([data.sample(i) for i in range(len(pairs))])
    with torch.no_grad():
        loss = PreferenceObjective(beta=0.2).loss(Borrowed(policy), ours)[0].item() / len(pairs)
        other = PreferenceObjective(beta=0.25).loss(Borrowed(policy), ours)[0].item() / len(pairs)
    assert loss == pytest.approx(expected, abs=2e-5)
    assert abs(other - expected) > 1e-3  # the control: another β is another number
