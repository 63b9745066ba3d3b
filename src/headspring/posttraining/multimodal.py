"""The multimodal stage: a decoder of the line learns to look or to listen, and answers questions in text.

A tower is put beside the trained decoder and both learn together, from nothing but the answers (LLaVA's second step, arXiv
2304.08485, without its first: towers here are too small to be trained alone). Measured on items that were not trained on, and
once more beside another item's picture or sound: what the words alone tell (`blind`).

What it gives up: nothing rehearses plain text, so that the model forgets some of it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from headspring.artifacts.errors import UserError
from headspring.data.media_questions import AboutDigits, Asked, MediaQuestions
from headspring.data.multimodal import example, join_examples
from headspring.data.rows import Rows
from headspring.inference.multimodal import answer
from headspring.models import load_model, save_model
from headspring.models.multimodal import MultimodalModule
from headspring.posttraining.rates import difference, rate
from headspring.tokenization.tokenizer import Tokenizer
from headspring.training import distributed
from headspring.training.callbacks import Validation
from headspring.training.config import TrainConfig
from headspring.training.loop import DTYPES, train
from headspring.training.multimodal import Answers, Sense, Sight, with_sense
from headspring.training.objective import held_out_loss
from headspring.training.optimizers import AdamW, OptimizerConfig

WORDS = 16  # tokens of a question and its answer, for an estimate


class MultimodalConfig(TrainConfig):
    """Which tower, what is asked, and how to train. `validation_questions` are asked of held-out items."""

    packs_documents: ClassVar[bool] = False

    tower: Sense = Sight()
    questions: MediaQuestions = AboutDigits()
    validation_questions: int = Field(200, gt=1)
    steps: int = Field(600, gt=0)
    batch_size: int = Field(32, gt=0)
    optimizer: OptimizerConfig = AdamW(learning_rate=0.003, weight_decay=0.01)

    def expected_tokens(self) -> int:
        """Of a row, about."""
        return self.questions.num_items * self.tower.tower(0, self.questions.shape).num_pieces + WORDS


class Asking:
    """How a question is written for a model: `placeholders` stand for its items, and the answer ends with `end`."""

    def __init__(self, model: MultimodalModule, tokenizer: Tokenizer, config: MultimodalConfig):
        self.model, self.tokenizer, self.config, self.name = model, tokenizer, config, config.tower.name
        tower = model.config.towers[self.name]
        begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self.opening = begin + [tower.placeholder] * (config.questions.num_items * tower.num_pieces)
        end = tokenizer.end_id if tokenizer.eos_id is None else tokenizer.eos_id
        if end is None:
            raise UserError("the tokenizer has no token that ends an answer; use one with eos")
        self.end = end

    def prompt(self, asked: Asked) -> list[int]:
        return [*self.opening, *self.tokenizer.encode(asked.question)]

    def reply(self, asked: Asked) -> list[int]:
        return [*self.tokenizer.encode(asked.answer), self.end]

    def rows(self, asked: Sequence[Asked], seed: int) -> Rows:
        """Raises `UserError` where a question is longer than the model's context."""
        made = [example(self.prompt(one), self.reply(one), {self.name: one.items}) for one in asked]
        longest, context = max(len(row.inputs) for row in made), self.model.config.context
        if longest > context:
            raise UserError(f"a question with its items takes {longest} tokens, and the model's context is {context}")
        return Rows(made, join_examples, longest, seed)

    def right(self, asked: Sequence[Asked], shown: Sequence[Asked]) -> list[bool]:
        """Which questions are answered rightly beside the items of `shown`."""
        longest = max(len(self.reply(one)) for one in asked)
        found: list[bool] = []
        for start in range(0, len(asked), self.config.batch_size):
            few = slice(start, start + self.config.batch_size)
            prompts = [np.array(self.prompt(one)) for one in asked[few]]
            media = [{self.name: one.items} for one in shown[few]]
            with self.model.computing_in(DTYPES[self.config.precision]):
                said = answer(self.model, prompts, media, longest, self.end)
            found += [ids == self.reply(one)[:-1] for ids, one in zip(said, asked[few], strict=True)]
        return found


def teach(config: MultimodalConfig, model_folder: Path, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Train the decoder of `model_folder` with a tower beside it, and write model and tokenizer.

    Returns the metrics; `answers` has the share of held-out questions answered rightly before and after, with intervals (95 %,
    paired for the difference), and `blind`, the same after training beside other items."""
    folder, tokenizer = Path(folder), Tokenizer.load(model_folder)
    model = with_sense(load_model(model_folder), config.tower, config.questions.shape, seed)
    asking = Asking(model, tokenizer, config)
    data = asking.rows(config.questions.asked(held_out=False, seed=seed), seed)
    held_out = config.questions.asked(held_out=True, seed=0)
    chosen = np.random.default_rng(0).permutation(len(held_out))[: config.validation_questions]
    asked = [held_out[index] for index in chosen]
    unseen = asking.rows(asked, 0)

    def measure() -> dict[str, float]:
        rows, dtype = len(asked), DTYPES[config.precision]
        return {"loss": held_out_loss(model, unseen, rows, config.batch_size, dtype, False, Answers())}

    before, loss = asking.right(asked, asked), measure()
    watch = Validation(measure, config.validate_every)
    result = train(model, Answers(), data, config, folder, [watch], "multimodal")
    after, others = asking.right(asked, asked), [*asked[1:], asked[0]]
    if distributed.rank() == 0:
        save_model(model, folder)
        tokenizer.save(folder)
    answers = {"before": rate(before), "after": rate(after), "difference": difference(before, after)}
    return {
        "parameters": model.num_parameters(),
        **result.metrics(),
        "validation_before": loss,
        "validation_after": measure(),
        "answers": {**answers, "blind": rate(asking.right(asked, others))},
        "questions": len(data.rows),
        "validation_questions": len(asked),
        "compute_dtype": config.precision,
    }
