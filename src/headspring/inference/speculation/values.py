"""The ways to propose tokens, as values of a config; `proposer` builds what does it for a model."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from headspring.artifacts import UserError
from headspring.artifacts.value import Variant
from headspring.inference.speculation.looking_ahead import LookingAhead
from headspring.inference.speculation.lookup import Lookup
from headspring.models.early_exit import exit_after
from headspring.models.heads import MultiTokenModule, find_head
from headspring.models.model import ModelModule
from headspring.tokenization.tokenizer import Tokenizer

if TYPE_CHECKING:
    from headspring.inference.speculation.speculator import Proposer


class Speculation(Variant):
    """At most `tokens` proposals a step, for each answer. `proposer` raises `UserError` for a model it does not work with."""

    tokens: int = Field(4, ge=1, le=64)

    def proposer(self, model: ModelModule, tokenizer: Tokenizer) -> "Proposer":
        raise NotImplementedError


class PromptLookup(Speculation):
    """What followed the last few tokens where they stood before, in the prompt or the answer. Needs no model and costs next
    to nothing; pays where answers repeat: edits, summaries, code. The longest match of `longest` … `shortest` tokens wins,
    then the latest."""

    kind: Literal["prompt_lookup"] = "prompt_lookup"
    tokens: int = Field(6, ge=1, le=64)
    longest: int = Field(4, ge=1, le=16)
    shortest: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _in_order(self) -> "PromptLookup":
        if self.shortest > self.longest:
            raise ValueError(f"shortest={self.shortest} is more than longest={self.longest}")
        return self

    def proposer(self, model: ModelModule, tokenizer: Tokenizer) -> "Proposer":
        return Lookup(self.longest, self.shortest)


class Draft(Speculation):
    """A smaller model with the same tokenizer, loaded from `model` as `LanguageModel.load` does (arXiv 2211.17192)."""

    kind: Literal["draft"] = "draft"
    model: str

    def proposer(self, model: ModelModule, tokenizer: Tokenizer) -> "Proposer":
        from headspring.inference.language_model import LanguageModel
        from headspring.inference.speculation.drafting import Drafting

        draft = LanguageModel.load(self.model, device=model.device, dtype=model.compute_dtype)
        if draft.tokenizer.library.get_vocab() != tokenizer.library.get_vocab():
            raise UserError(f"the draft model {self.model!r} has another tokenizer; its tokens would mean something else")
        if draft.model.config.reads_source or model.config.reads_source:
            raise UserError("a draft model reads no source; for an encoder–decoder use prompt_lookup")
        return Drafting(draft.model, tokenizer.vocab_size)


class EarlyExit(Speculation):
    """The model's own first `layers`, and then its norm and head (arXiv 2404.16710). Pays for models that were trained to be
    readable there."""

    kind: Literal["early_exit"] = "early_exit"
    layers: int = Field(ge=1)

    def proposer(self, model: ModelModule, tokenizer: Tokenizer) -> "Proposer":
        from headspring.inference.speculation.drafting import Drafting

        try:
            return Drafting(exit_after(model, self.layers), tokenizer.vocab_size)
        except ValueError as error:
            raise UserError(f"early exit: {error}") from None


class MultiToken(Speculation):
    """The model's heads for tokens further ahead, which propose as many as they see (arXiv 2404.19737; 2412.19437, section
    2.2). `window`: tokens back that they read."""

    kind: Literal["multi_token"] = "multi_token"
    window: int = Field(32, ge=1)

    def proposer(self, model: ModelModule, tokenizer: Tokenizer) -> "Proposer":
        return LookingAhead(model, find_head(model, MultiTokenModule), self.window, tokenizer.vocab_size)
