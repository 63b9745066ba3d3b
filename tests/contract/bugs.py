"""Planted bugs: each is a context manager `bug(model)` inside which the model, or what handles it, is wrong in one way."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import save
from torch.nn.functional import cross_entropy

from headspring.data.batch import IGNORE
from headspring.models import block_sparse, dialects, folder, scoring
from headspring.models.block import BranchModule
from headspring.models.context import Context, Visibility
from headspring.models.ngram import kneser_ney
from headspring.models.part import PartModule
from headspring.models.state import KeyValueState, RecurrentState, State
from headspring.models.window import WindowState
from headspring.training import checkpoint
from headspring.training.objective import NextToken
from tests.contract.checks import streams


@contextmanager
def one_logit_short(model) -> Iterator[None]:
    original = model.logits
    with patch.object(model, "logits", lambda hidden: original(hidden)[..., :-1]):
        yield


@contextmanager
def half_precision_logits(model):
    original = model.logits
    with patch.object(model, "logits", lambda hidden: original(hidden).bfloat16()):
        yield


def reads_masks(model) -> bool:
    """Whether some layer attends: what goes wrong with masks and keys cannot go wrong elsewhere."""
    return any(name.endswith(".mixer.pattern") for name in model.sites.plain)


def only(applies):
    """The bug can be planted where `applies(model)`."""

    def mark(bug):
        bug.applies = applies
        return bug

    return mark


@contextmanager
def leaks_from_the_future(model):
    original = model.forward

    def leaky(*arguments, **masks):
        hidden = original(*arguments, **masks)
        return hidden + 1e-3 * hidden.flip(1).cumsum(1).flip(1)

    with patch.object(model, "forward", leaky):
        yield


@only(reads_masks)
@contextmanager
def sees_the_future(model):
    """Also behind a mask: every key that is not masked for another reason is open."""
    original = Context.visibility

    def open_mask(self, mask):
        seen = original(self, mask)
        allowed = None if seen.mask is None else seen.mask | seen.mask.mT
        self.prepared[repr(mask)] = Visibility(allowed, causal=False)

    def open_lists(blocks, keys, positions, sees):
        return lists(blocks, keys, positions, torch.ones_like(sees))

    lists = block_sparse._with_everything_seen
    with patch.object(Context, "visibility", open_mask), patch.object(block_sparse, "_with_everything_seen", open_lists):
        yield


@contextmanager
def blind_to_the_future(model):
    original = Context.visibility

    def closed_mask(self, mask):
        original(self, mask)
        total = self.past + self.time
        self.prepared[repr(mask)] = Visibility(torch.ones(1, 1, self.time, total, dtype=torch.bool).tril(), causal=False)

    with patch.object(Context, "visibility", closed_mask):
        yield


@contextmanager
def pretends_to_have_a_state(model):
    with patch.object(model, "new_state", lambda batch, capacity: State([], batch, capacity, model.device)):
        yield


@contextmanager
def padding_ignored(model):
    reader = streams(model)[-1][1]
    original = reader._context

    def unpadded(time, past, segments, padding, *memory):
        return original(time, past, segments, None, *memory)

    with patch.object(reader, "_context", unpadded):
        yield


@contextmanager
def segments_ignored(model):
    reader = streams(model)[-1][1]
    original = reader._context

    def unpacked(time, past, segments, padding, *memory):
        return original(time, past, None, padding, *memory)

    with patch.object(reader, "_context", unpacked):
        yield


@contextmanager
def rows_leak_into_each_other(model):
    original = model.forward

    def leaky(*arguments, **masks):
        hidden = original(*arguments, **masks)
        return hidden + 1e-3 * hidden.mean(0, keepdim=True)

    with patch.object(model, "forward", leaky):
        yield


@contextmanager
def cache_off_by_one(model):
    """The first new key and value overwrite the last ones that are stored; a folded state forgets the last call."""
    original = KeyValueState.append

    def append(self, k, v):
        length, self.length = self.length, max(0, self.length - 1)
        keys, values = original(self, k, v)
        self.length = length + k.shape[2]
        if length:  # the right number of keys, all but the last shifted
            keys, values = self.keys[:, :, : self.length], self.values[:, :, : self.length]
        return keys, values

    def replace(self, tokens, **tensors):
        stale = self.tensors if self.length else tensors
        folded(self, tokens, **{name: stale[name] for name in tensors})

    def slide(self, k, v, padding):
        keys, values = sliding(self, k, v, padding)
        return (keys, values) if keys.shape[2] == k.shape[2] else (keys.roll(1, dims=2), values.roll(1, dims=2))

    folded, sliding = RecurrentState.replace, WindowState.append
    with (
        patch.object(KeyValueState, "append", append),
        patch.object(RecurrentState, "replace", replace),
        patch.object(WindowState, "append", slide),
    ):
        yield


@contextmanager
def padding_forgotten_after_prefill(model):
    reader = streams(model)[-1][1]
    original = reader._check_state

    def forgetful(state, *rest):
        padding = original(state, *rest)
        state.padding = None
        return padding

    with patch.object(reader, "_check_state", forgetful):
        yield


@contextmanager
def rewind_leaves_one(model):
    original = KeyValueState.rewind_to

    def rewind_to(self, length):
        original(self, length)
        self.keys[:, :, self.length - 1] = self.keys[:, :, self.length]
        self.values[:, :, self.length - 1] = self.values[:, :, self.length]

    def stay(self, length):
        tensors = self.tensors
        folded(self, length)
        self.tensors = tensors

    def slide_back(self, length):
        sliding(self, length)
        last = length - self.base
        self.recent[:, :, :, last - 1] = self.recent[:, :, :, last]

    folded, sliding = RecurrentState.rewind_to, WindowState.rewind_to
    with (
        patch.object(KeyValueState, "rewind_to", rewind_to),
        patch.object(RecurrentState, "rewind_to", stay),
        patch.object(WindowState, "rewind_to", slide_back),
    ):
        yield


@contextmanager
def select_forgets_values(model):
    def select(self, rows):
        self.keys, self.values = self.keys[rows], self.values[torch.arange(len(rows)) % len(self.values)]

    def any_row(self, rows):
        self.tensors = {name: value[torch.arange(len(rows)) % len(value)] for name, value in self.tensors.items()}

    def wrong_values(self, rows):
        other = torch.arange(len(rows)) % self.recent.shape[1]
        self.recent = torch.stack([self.recent[0, rows], self.recent[1, other]])
        self.first = self.first[:, rows]

    with (
        patch.object(KeyValueState, "select", select),
        patch.object(RecurrentState, "select", any_row),
        patch.object(WindowState, "select", wrong_values),
    ):
        yield


@only(reads_masks)
@contextmanager
def select_forgets_padding(model):
    original = State.select

    def select(self, rows):
        padding = self.padding
        original(self, rows)
        self.padding = padding[torch.arange(len(rows)) % len(padding)]

    with patch.object(State, "select", select):
        yield


@contextmanager
def copies_end_to_end(model):
    def fork(self, copies):
        self.select(torch.arange(self.batch).repeat(copies))

    with patch.object(State, "fork", fork):
        yield


@contextmanager
def looking_scales(model):
    def site(self, name, value):
        return value if self.tap is None else self.tap(name, value) * 1.001

    with patch.object(PartModule, "site", site):
        yield


@contextmanager
def edits_dropped(model):
    def site(self, name, value):
        if self.tap is not None:
            self.tap(name, value)
        return value

    with patch.object(PartModule, "site", site):
        yield


@contextmanager
def stream_added_twice(model):
    original = BranchModule.combine
    with patch.object(BranchModule, "combine", lambda self, x, y: original(self, x, y) + x):
        yield


# ---- training and formats


@contextmanager
def blind_to_its_input(model):
    """Every token looks like the first of the vocabulary, a source's too, so that only frequencies can be learned."""
    original = type(model).forward

    def blind(self, tokens, **masks):
        unseen = {"source": torch.zeros_like(masks["source"])} if "source" in masks else {}
        return original(self, torch.zeros_like(tokens), **masks | unseen)

    with patch.object(type(model), "forward", blind):
        yield


@contextmanager
def optimizer_forgotten(model):
    original = checkpoint.restore

    def restore(snapshot, *rest):
        kept = {name: tensor for name, tensor in snapshot.tensors.items() if not name.startswith("optimizer/")}
        original(replace(snapshot, tensors=kept), *rest)

    with patch.object(checkpoint, "restore", restore):
        yield


@contextmanager
def mean_of_means(model):
    count, loss = NextToken.count, NextToken.loss

    def mean(self, model, batch):
        total, metrics = loss(self, model, batch)
        return total / max(1, count(self, batch)), metrics

    with patch.object(NextToken, "count", lambda self, batch: 1), patch.object(NextToken, "loss", mean):
        yield


@contextmanager
def mask_ignored(model):
    def everything(hidden, targets):
        return hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).clamp(min=0)

    with patch.object(scoring, "_kept", everything):
        yield


@contextmanager
def mean_over_nothing(model):
    def loss(self, model, batch):
        logits = model.logits(model(batch.inputs))
        return cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE), {}

    with patch.object(NextToken, "loss", loss):
        yield


@contextmanager
def documents_run_together(model):
    original = kneser_ney._join

    def join(documents):
        return original([np.concatenate([document[1:] for document in documents])])

    with patch.object(kneser_ney, "_join", join):
        yield


@contextmanager
def saved_in_half_precision(model):
    def lossy(tensors, metadata):
        return save({name: tensor.bfloat16().float() for name, tensor in tensors.items()}, metadata)

    with patch.object(folder, "save", lossy):
        yield


@contextmanager
def exported_in_another_pairing(model):
    """The rows of the queries (or of a state space's first matrix) are written with neighbours in the place of halves; what has
    no format, as nothing at all."""
    original = dialects.to_theirs

    def paired(rules, ours):
        names = [name for name in ours if name.endswith(("mixer.f.q.weight", "mixer.f.in_proj.weight"))]
        wrong = {name: ours[name].unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1) for name in names}
        return original(rules, {**ours, **wrong})

    if dialects.expresses(model.config):
        with patch.object(dialects, "to_theirs", paired):
            yield
    else:
        with patch.object(dialects, "export_huggingface", lambda model, folder: None):
            yield
