"""What is checked before a job is taken: nothing that can never be answered gets into a queue."""

from collections.abc import Sequence as Rows

import torch

from headspring.artifacts import UserError
from headspring.inference.engine.job import Job
from headspring.inference.generation import Request
from headspring.inference.sampling_params import SamplingParams
from headspring.models import EncoderDecoder
from headspring.models.model import Model, ModelModule
from headspring.models.multimodal import MultimodalModule
from headspring.models.soft_tokens import SoftTokens
from headspring.tokenization.tokenizer import Tokenizer


def checked_prompt(model: Model, prompt: Rows[int], params: SamplingParams, source: Rows[int]) -> list[int]:
    """The tokens that an answer follows; those of an encoder–decoder begin with its `start`. Raises `UserError`."""
    require_causal(model)
    prompt = [int(token) for token in prompt]
    if isinstance(model, EncoderDecoder):
        prompt = prompt or [model.start]
        if not len(source):
            raise UserError("an encoder–decoder writes about what its encoder reads: give it a source")
        if len(source) > (limit := model.encoder.context):
            raise UserError(f"the source has {len(source)} tokens, and the encoder reads {limit}; shorten it")
    elif len(source):
        raise UserError(f"a model of kind {model.kind!r} has no encoder to read a source; put it into the prompt")
    if not prompt:
        raise UserError("the prompt is empty, and the tokenizer has no <|bos|> to begin with; give a token")
    check_ids([*prompt, *source, *params.stop_token_ids], model.vocab)
    return prompt


def require_causal(model: Model) -> None:
    """Raise `UserError` for a model that sees both ways: what it says of a token follows from the token itself."""
    if not model.causal:
        raise UserError(f"a model of kind {model.kind!r} sees both ways and continues no text; use embed")


def check_ids(ids: Rows[int], vocab: int) -> None:
    """Raise `UserError` for ids that are no tokens."""
    if ids and not 0 <= min(ids) <= max(ids) < vocab:
        wrong = next(token for token in ids if not 0 <= token < vocab)
        raise UserError(f"token id {wrong} is outside the model's vocabulary of {vocab}")


def check_soft(model: ModelModule, soft: SoftTokens, prompt: list[int]) -> None:
    """Raise `UserError` where what towers saw has no place in the prompt."""
    if not isinstance(model, MultimodalModule):
        raise UserError(f"a model of kind {model.config.kind!r} takes no pictures or sounds; leave them out")
    model.check_all_used(soft, torch.tensor([prompt], device=model.device))


def request_of(job: Job, context: int, tokenizer: Tokenizer, answer: int = 0) -> Request:
    """Answer number `answer` of a job, with nothing written yet. Raises `UserError` for a prompt that fills the context."""
    if len(job.prompt) >= context:
        raise UserError(f"the prompt has {len(job.prompt)} tokens and the model's context {context}; shorten it")
    ends = [end for end in (tokenizer.eos_id, tokenizer.end_id) if end is not None]
    return Request(
        tokenizer,
        job.prompt,
        job.params,
        context=context,
        end_ids=ends,
        answer=answer,
        incremental=job.notify is not None,
        source=job.source,
    )
