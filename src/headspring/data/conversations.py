"""Conversations as training rows: whole, packed, and trained only where the assistant speaks.

A conversation is rendered by the tokenizer, which says for each token whether an assistant wrote it. The target of a
position is the next token where that token is trained, and IGNORE elsewhere; the `<|end|>` after an answer is trained
(a model that never learns to stop is the most reported defect of fine-tuning), the `<|assistant|>` before it is not.

Packing is best-fit decreasing into rows of `sequence_length`; each conversation is a segment of its own, so that with
the document mask it sees only itself. The packing is made once and each epoch visits the rows in a new order, which
makes `sample(i)` a pure function with an exact inverse. What this gives up: a row's neighbours stay the same in every
epoch, which changes nothing under the document mask. A conversation that does not fit is dropped and counted: cutting
it would train an answer without its question or a question without its answer.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np

from headspring.artifacts import UserError
from headspring.data.batch import IGNORE, Sample, Visit
from headspring.data.permutation import Epochs
from headspring.data.tasks import Task
from headspring.text.chat import Message
from headspring.tokenization.tokenizer import Tokenizer


@dataclass(frozen=True)
class Conversation:
    """One rendered conversation as inputs and targets, one shorter than its tokens."""

    inputs: np.ndarray  # (n,) int64
    targets: np.ndarray  # (n,) int64; IGNORE where the next token is not the assistant's
    document_id: str
    byte_start: int
    byte_end: int

    @property
    def trained_tokens(self) -> int:
        return int((self.targets != IGNORE).sum())


@dataclass(frozen=True)
class Rendering:
    """The conversations that fit, and how many did not."""

    conversations: tuple[Conversation, ...]
    dropped: int


def render_targets(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
    """A conversation's inputs and response-only targets: (n,) int64 each, n = its tokens − 1."""
    rendered = tokenizer.render(messages)
    ids = np.asarray(rendered.ids, dtype=np.int64)
    trained = np.asarray(rendered.trained, dtype=bool)
    return ids[:-1], np.where(trained[1:], ids[1:], IGNORE)


def render_tasks(tokenizer: Tokenizer, tasks: Sequence[Task], sequence_length: int) -> Rendering:
    """The tasks' conversations of at most `sequence_length` inputs, in order; longer ones are dropped and counted.

    Raises `UserError` where nothing is left, or where a conversation has no trained token (it could teach nothing)."""
    conversations = []
    for task in tasks:
        inputs, targets = render_targets(tokenizer, task.conversation)
        if (targets == IGNORE).all():
            raise UserError(f"task {task.id} has no trained token: an assistant must speak in every conversation")
        if len(inputs) <= sequence_length:
            conversations.append(Conversation(inputs, targets, task.document_id, task.byte_start, task.byte_end))
    if not conversations:
        raise UserError(f"none of {len(tasks)} conversations fits into {sequence_length} tokens; raise sequence_length")
    return Rendering(tuple(conversations), len(tasks) - len(conversations))


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of item indices, each at most `capacity` long: best-fit decreasing, deterministic, O(n log n + shifts)."""
    bins: list[list[int]] = []
    space: list[tuple[int, int]] = []  # (room left, bin), sorted
    for item in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        place = bisect_left(space, (lengths[item], 0))
        if place < len(space):
            room, chosen = space.pop(place)
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(item)
        insort(space, (room - lengths[item], chosen))
    return bins


class PackedConversations:
    """A `SampleSource` of packed conversations: epoch after epoch, `num_samples` samples in all (None: one epoch).

    `rows`: samples of one epoch. `dropped`: conversations too long for `sequence_length`."""

    def __init__(
        self,
        tasks: Sequence[Task],
        tokenizer: Tokenizer,
        sequence_length: int,
        seed: int = 0,
        num_samples: int | None = None,
    ):
        rendering = render_tasks(tokenizer, tasks, sequence_length)
        self.conversations, self.dropped = rendering.conversations, rendering.dropped
        self.sequence_length = sequence_length
        self._pad = tokenizer.pad_id or 0  # never a target, and in a segment of its own
        self._bins = best_fit([len(item.inputs) for item in self.conversations], sequence_length)
        self._order = Epochs(self.rows, "conversations", seed)
        self.num_samples = self.rows if num_samples is None else num_samples

    @property
    def rows(self) -> int:
        return len(self._bins)

    def __len__(self) -> int:
        return self.num_samples

    def first(self, num_samples: int) -> "PackedConversations":
        """The same stream, `num_samples` samples long."""
        stream = copy(self)
        stream.num_samples = num_samples
        return stream

    def sample(self, index: int) -> Sample:
        """Row `index` of the stream; pure, and defined for every index ≥ 0."""
        inputs = np.full(self.sequence_length, self._pad, dtype=np.int64)
        targets = np.full(self.sequence_length, IGNORE, dtype=np.int64)
        segments = np.zeros(self.sequence_length, dtype=np.int32)
        start = 0
        for segment, item in enumerate(self._bins[self._order(index)]):
            conversation = self.conversations[item]
            end = start + len(conversation.inputs)
            inputs[start:end], targets[start:end] = conversation.inputs, conversation.targets
            segments[start:end] = segment
            start = end
        segments[start:] = segments[start - 1] + 1  # padding is the last segment
        return Sample(inputs, targets, segments)

    def where(self, document_id: str) -> list[Visit]:
        """Every visit among the `num_samples` samples: a conversation's inputs, the bytes its task was made from."""
        visits = []
        for row, items in enumerate(self._bins):
            start = 0
            for item in items:
                conversation = self.conversations[item]
                end = start + len(conversation.inputs)
                if conversation.document_id == document_id:
                    spans = (start, end, conversation.byte_start, conversation.byte_end)
                    visits += [Visit(sample, *spans) for sample in self._order.places(row, self.num_samples)]
                start = end
        return sorted(visits, key=lambda visit: (visit.sample, visit.start))
