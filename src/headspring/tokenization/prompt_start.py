"""The token that a text begins with, as other programs look for it: in `tokenizer.json`'s post-processor.

Headspring adds `<|bos|>` where a model reads a text, never in the tokenizer: a training document, a prompt and a piece of a
conversation begin differently. `transformers` and vLLM know one place only, the file's post-processor; without it they would
show a model prompts of a form that it was never trained on. So what is exported has one, and what is loaded loses it again:
the way there and back changes no byte. A tokenizer that came with a post-processor of its own keeps that.
"""

import json
from typing import Any

from tokenizers import Tokenizer as LibraryTokenizer

from headspring.text import chat

PLACE = "post_processor"


def with_start(description: dict[str, Any], token: str, id: int) -> str:
    """A `tokenizer.json` that begins each text with `token`, where it does not say yet what a text stands between."""
    if description.get(PLACE) is None:
        description = description | {PLACE: _post_processor(token, id)}
    return json.dumps(description, ensure_ascii=False, indent=2)


def without_start(library: LibraryTokenizer) -> LibraryTokenizer:
    """The tokenizer as it was before `with_start`, where it is one of Headspring's own; any other unchanged."""
    id = library.token_to_id(chat.BOS)
    if library.post_processor is None or id is None or library.token_to_id(chat.END) is None:
        return library
    description = json.loads(library.to_str())
    if description[PLACE] != _post_processor(chat.BOS, id):
        return library
    return LibraryTokenizer.from_str(json.dumps(description | {PLACE: None}))


def _post_processor(token: str, id: int) -> dict[str, Any]:
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    one, other = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
    tokens = {token: {"id": token, "ids": [id], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": [first, one], "pair": [first, one, other], "special_tokens": tokens}
