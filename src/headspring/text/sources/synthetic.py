"""Synthetic text: templates with seeded choices, and a model's continuations of them. Always marked as synthetic.

    templates: ["{name} has {n} {thing}."]
    slots: {name: [Ada, Alan], n: 2..9, thing: [apples, books]}
    documents: 1000

Document i depends on the seed and i alone, so that asking for more documents never changes the first ones. With
`model: true` the filled templates are prompts, and the document is what the model that the line passes in made of
them; prompt and document index stay in the metadata.
"""

import random
import re
from collections.abc import Iterator
from itertools import islice
from typing import Literal

from pydantic import Field, model_validator

from headspring.artifacts.errors import UserError
from headspring.text.documents import Document, Kind
from headspring.text.sources.base import Profile, Reading, SourceConfig

SLOT = re.compile(r"\{(\w+)\}")
RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
MODEL_BATCH = 16


class Synthetic(SourceConfig):
    """`documents` texts from `templates`, whose `{slot}`s are filled from `slots`: a list of choices, or "low..high"
    for a whole number in that range, both ends included. `model: true` sends them to the model as prompts."""

    kind: Literal["synthetic"] = "synthetic"
    templates: list[str] = Field(min_length=1)
    slots: dict[str, list[str | int | float] | str] = Field(default={})
    documents: int = Field(default=1000, gt=0)
    model: bool = False
    document_kind: Kind = "prose"

    @model_validator(mode="after")
    def _slots_are_complete(self) -> "Synthetic":
        used = {slot for template in self.templates for slot in SLOT.findall(template)}
        if missing := sorted(used - self.slots.keys()):
            raise ValueError(f"template slot {{{missing[0]}}} has no choices; add it to `slots`")
        if unused := sorted(self.slots.keys() - used):
            raise ValueError(f"slot {unused[0]!r} is in no template; use it or remove it")
        for slot, choices in self.slots.items():
            match = RANGE.fullmatch(choices) if isinstance(choices, str) else None
            if isinstance(choices, str) and (match is None or int(match[1]) > int(match[2])):
                raise ValueError(f"slot {slot!r}: {choices!r} is neither a range like 1..9 nor a list of choices")
            if not choices:
                raise ValueError(f"slot {slot!r} has no choices; give at least one")
        return self

    def read(self, name: str, reading: Reading) -> Iterator[Document]:
        prompts = (self.fill(index, reading.seed) for index in range(self.documents))
        index = 0
        while batch := list(islice(prompts, MODEL_BATCH)):
            texts = self._texts(name, [prompt for prompt, _ in batch], reading)
            for (prompt, template), text in zip(batch, texts, strict=True):
                metadata: dict[str, object] = {"index": index, "template": template}
                if self.model:
                    metadata["prompt"] = prompt
                place = f"synthetic:{name}#{index}"
                yield Document(text, name, self.document_kind, place, synthetic=True, metadata=metadata)
                index += 1

    def default_profile(self, document: Document) -> Profile:
        return "none"

    def fill(self, index: int, seed: int) -> tuple[str, int]:
        """Text number `index` and the number of the template it was made from."""
        choose = random.Random(f"{seed}:{index}")
        number = choose.randrange(len(self.templates))
        return SLOT.sub(lambda match: str(self._choose(match[1], choose)), self.templates[number]), number

    def _choose(self, slot: str, choose: random.Random) -> str | int | float:
        choices = self.slots[slot]
        if isinstance(choices, str):
            low, high = choices.split("..")
            return choose.randint(int(low), int(high))
        return choose.choice(choices)

    def _texts(self, name: str, prompts: list[str], reading: Reading) -> list[str]:
        if not self.model:
            return prompts
        if reading.generate is None:
            raise UserError(f"source {name!r}: `model: true` needs a model, and this line has none at this point")
        texts = list(reading.generate(prompts))
        if len(texts) != len(prompts):
            raise UserError(f"source {name!r}: the model gave {len(texts)} texts for {len(prompts)} prompts")
        return texts
