"""What training a model will hold in memory, for the plan: arithmetic on its ledger, and no measurement.

    weights       4 bytes a parameter, as they are trained in float32 whatever the activations; a frozen reference once more
    gradients     4 bytes a parameter
    optimizer     AdamW two float32 moments a parameter, Muon one for each hidden matrix
    activations   the ledger's bytes a token, for the tokens of one micro-batch; twice in float32
    logits        a chunk of rows over the vocabulary, in float32 (`models.scoring`)

What is left out: what Python and torch take before a model is there, the data, and room that an allocator does not reuse.
"""

from importlib import import_module
from typing import Any

from headspring.line.estimates import PAIR_TOKENS
from headspring.line.registry import Known, Memory, Sizes

FLOAT = 4


def pretrain(config: Any, known: Known) -> Memory | None:
    """Of the model that the config describes; None for what is counted."""
    figures = import_module("headspring.training.pretrain").sizes(config, known.configs["tokenizer"].vocab_size)
    length = config.sequence_length or config.model.context
    return None if figures is None else _training(config, Sizes(**figures), length)


def sft(config: Any, known: Known) -> Memory | None:
    """Of the model it starts from, on rows of its own length."""
    return _further(config, known, config.sequence_length)


def preference(config: Any, known: Known) -> Memory | None:
    """The same beside a frozen reference."""
    return _further(config, known, PAIR_TOKENS, frozen=1)


def contrastive(config: Any, known: Known) -> Memory | None:
    """The same; a pair is a query and a passage."""
    return _further(config, known, config.pairs.query_tokens + config.pairs.passage_tokens)


def multimodal(config: Any, known: Known) -> Memory | None:
    """The same; the tower beside it is small."""
    return _further(config, known, config.expected_tokens())


def _further(config: Any, known: Known, length: float | None, frozen: int = 0) -> Memory | None:
    model = known.memories.get("model")
    return None if model is None else _training(config, model.sizes, length or model.sizes.context, frozen)


def _training(config: Any, sizes: Sizes, length: float, frozen: int = 0) -> Memory:
    tokens = (config.micro_batch_size or config.batch_size) * length
    moments = sizes.parameters if config.optimizer.kind == "adamw" else sizes.parameters - sizes.matrices
    a_token = sizes.checkpointed if config.activation_checkpointing else sizes.activations
    chunk = import_module("headspring.models.scoring").CHUNK
    return Memory(
        weights=FLOAT * sizes.parameters * (1 + frozen),
        gradients=FLOAT * sizes.parameters,
        optimizer=FLOAT * (moments + sizes.parameters),
        activations=tokens * a_token * (2 if config.precision == "fp32" else 1),
        logits=FLOAT * min(tokens, chunk) * sizes.vocab,
        tokens=tokens,
        sizes=sizes,
    )
