"""The contenders of pretraining.py. Each trains on the same batches and stops after every turn to report and wait."""

import json
import math
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from headspring.data.batch import IGNORE, collate
from headspring.data.packing import PackedTokens
from headspring.data.shards import TokenShards

HELD_OUT_SAMPLES = 64


class Turns:
    """Counts steps; after each turn measures the held-out loss, reports, and waits for the driver's word."""

    def __init__(self, turn: int, parameters: int, loss):
        self.turn, self.loss, self.done = turn, loss, 0
        print(json.dumps({"turn": -1, "parameters": parameters}), flush=True)
        sys.stdin.readline()
        self.started = time.perf_counter()

    def step(self) -> None:
        self.done += 1
        if self.done % self.turn:
            return
        seconds = time.perf_counter() - self.started
        print(json.dumps({"turn": self.done // self.turn, "seconds": seconds, "loss": self.loss()}), flush=True)
        sys.stdin.readline()
        self.started = time.perf_counter()


class Data:
    """The batches that every contender trains on, and the held-out ones."""

    def __init__(self, arguments):
        self.arguments = arguments
        shards = TokenShards(arguments.data / "tokens")
        samples = arguments.steps * arguments.batch
        self.train = PackedTokens(shards, "train", arguments.length, num_samples=samples)
        self.held_out = PackedTokens(shards, "validation", arguments.length)

    def batch(self, step: int):
        size = self.arguments.batch
        return collate([self.train.sample(i) for i in range(step * size, (step + 1) * size)], document_mask=False)

    def held_out_loss(self, nats_of) -> float:
        """Mean nats per token; `nats_of(inputs, targets)` sums them over one batch."""
        nats, count = 0.0, 0
        rows = min(HELD_OUT_SAMPLES, len(self.held_out))
        with torch.no_grad():
            for start in range(0, rows, 8):
                batch = collate([self.held_out.sample(i) for i in range(start, min(start + 8, rows))], False)
                nats += float(nats_of(batch.inputs, batch.targets))
                count += int((batch.targets != IGNORE).sum())
        return nats / count


def cosine(step: int, steps: int, warmup: int = 20) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ---- ours


def headspring(arguments, data: Data, **optimizer) -> None:
    from headspring.models.scoring import cross_entropy_sum
    from headspring.training.callbacks import Callback
    from headspring.training.loop import train
    from headspring.training.objective import NextToken
    from headspring.training.pretrain import PretrainConfig

    shape = {name: getattr(arguments, name) for name in ("width", "depth", "heads")}
    config = PretrainConfig.model_validate(
        {
            "model": shape | {"context": arguments.length},
            "steps": arguments.steps,
            "batch_size": arguments.batch,
            "checkpoint_every": arguments.steps,
        }
        | optimizer
    )
    model = config.model.decoder(arguments.vocab).build()

    def nats(inputs, targets):
        return cross_entropy_sum(model, model(inputs), targets)

    class Wait(Callback):
        def on_start(self, run):
            self.turns = Turns(arguments.turn, model.num_parameters(), lambda: data.held_out_loss(nats))

        def on_step(self, run, record):
            self.turns.step()

    with tempfile.TemporaryDirectory() as folder:
        train(model, NextToken(), data.train, config, Path(folder), [Wait()])


# ---- a plain loop in the style of nanoGPT


class Block(nn.Module):
    """GPT-2: LayerNorm, fused query–key–value, GELU, biases."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        batch, time_, width = x.shape
        split = self.qkv(self.norm1(x)).view(batch, time_, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, time_, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """Learned positions, tied head."""

    def __init__(self, arguments):
        super().__init__()
        self.embed = nn.Embedding(arguments.vocab, arguments.width)
        self.position = nn.Embedding(arguments.length, arguments.width)
        self.blocks = nn.ModuleList(Block(arguments.width, arguments.heads) for _ in range(arguments.depth))
        self.norm = nn.LayerNorm(arguments.width)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * arguments.depth) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens, targets):
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = nn.functional.linear(self.norm(x), self.embed.weight)
        return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


def reference(arguments, data: Data, compiled: bool = False) -> None:
    torch.manual_seed(0)
    model = GPT2(arguments)
    parameters = sum(p.numel() for p in model.parameters())
    decayed = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=arguments.peer_rate, betas=(0.9, 0.95), fused=True)
    forward = torch.compile(model) if compiled else model

    def nats(inputs, targets):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(inputs, targets) * (targets != IGNORE).sum()

    turns = Turns(arguments.turn, parameters, lambda: data.held_out_loss(nats))
    for step in range(arguments.steps):
        for group in optimizer.param_groups:
            group["lr"] = arguments.peer_rate * cosine(step, arguments.steps)
        batch = data.batch(step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = forward(batch.inputs, batch.targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        turns.step()


# ---- Hugging Face


def trainer(arguments, data: Data, compiled: bool = False) -> None:
    from torch.utils.data import Dataset
    from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from headspring.models.decoder import hidden_size

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=arguments.vocab,
        hidden_size=arguments.width,
        intermediate_size=hidden_size(arguments.width),
        num_hidden_layers=arguments.depth,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.heads,
        head_dim=arguments.width // arguments.heads,
        max_position_embeddings=arguments.length,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = Qwen3ForCausalLM(config)

    class Rows(Dataset):
        """`labels` are the inputs: Qwen3 shifts them itself; our ignored targets become ignored labels."""

        def __len__(self):
            return arguments.steps * arguments.batch

        def __getitem__(self, index):
            sample = data.train.sample(index)
            labels = sample.inputs.copy()
            labels[1:][sample.targets[:-1] == IGNORE] = IGNORE
            return {"input_ids": torch.from_numpy(sample.inputs), "labels": torch.from_numpy(labels)}

    def nats(inputs, targets):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=inputs).logits
        return cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")

    class Wait(TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.turns = Turns(arguments.turn, model.num_parameters(), lambda: data.held_out_loss(nats))

        def on_step_end(self, *_, **__):
            self.turns.step()

    class InOrder(Trainer):
        def _get_train_sampler(self, *_, **__):
            return torch.utils.data.SequentialSampler(Rows())

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch,
            learning_rate=arguments.peer_rate,
            adam_beta2=0.95,
            weight_decay=0.1,
            max_grad_norm=1.0,
            warmup_steps=20,
            lr_scheduler_type="cosine",
            optim="adamw_torch_fused",
            bf16=True,
            use_cpu=True,
            torch_compile=compiled,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        InOrder(model=model, args=settings, train_dataset=Rows(), callbacks=[Wait()]).train()


def work(arguments) -> None:
    """Run one contender, named on the command line."""
    torch.manual_seed(0)
    data = Data(arguments)
    name, _, variant = arguments.worker.partition("-")
    if name == "headspring":
        adamw = {"optimizer": {"kind": "adamw", "learning_rate": arguments.peer_rate}}
        headspring(arguments, data, **(adamw if variant == "adamw" else {}))
    else:
        {"reference": reference, "trainer": trainer}[name](arguments, data, compiled=variant == "compiled")
