"""`LanguageModel`: a model, its tokenizer and its config, and everything one asks of them.

It holds no second forward pass: generating, scoring and looking inside all call the module that was trained
(`models`), and log-probabilities come from the one path (`models.scoring`). Text is typed: a prompt is encoded as
plain text behind one `<|bos|>`, as a training document is; only `chat` writes control tokens; sampled ids are never
re-encoded.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from headspring.artifacts import UserError
from headspring.artifacts.progress import task
from headspring.inference.decoding import decode, in_batches
from headspring.inference.embeddings import embed, read_pooling, write_pooling
from headspring.inference.generation import Generation, Request
from headspring.inference.loading import BASE_KINDS, choose_device, choose_dtype, download, find, read_model
from headspring.inference.sampling import SamplingParams
from headspring.models import EncoderDecoder, save_model, scoring
from headspring.models.dialects import export_huggingface, expresses
from headspring.models.model import ModelModule
from headspring.models.pooling import Pooling
from headspring.text.chat import Message
from headspring.tokenization.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Messages = Sequence[Message | Mapping[str, str]]
BATCH_SIZE = 64  # rows that run together; the state's memory grows with it


class LanguageModel:
    """`model` (`torch.nn.Module`), `tokenizer` and `config` (pydantic), ready to be asked.

    `kind` is the stage that made it, where known: a base model (`pretrain`) warns when asked to chat. `folder` is where it
    was loaded from, and may say how its embeddings are pooled."""

    def __init__(self, model: ModelModule, tokenizer: Tokenizer, kind: str | None = None, folder: Path | None = None):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.config: BaseModel = model.config
        self.kind = kind
        self.folder = folder
        if tokenizer.vocab_size > self.vocab_size:
            raise UserError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {self.vocab_size}: not a pair")

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        quantize: str | None = None,
        revision: str | None = None,
    ) -> "LanguageModel":
        """The model at `path`: a run folder (its last finished model stage), a stage's folder, a Hugging Face folder or
        hub name (at `revision`), or a `.gguf` file. `dtype="auto"` keeps the precision the weights are stored in.
        Raises `UserError`."""
        if quantize is not None:
            raise UserError(f"quantize={quantize!r} is not supported yet; leave it out, or use dtype='bfloat16'")
        target, precision = choose_device(device), choose_dtype(dtype)
        source = find(path)
        if revision is not None and source.folder is not None:
            raise UserError(f"revision={revision!r} belongs to a hub name; {source.name} is on this machine")
        folder = source.folder or download(source.name, revision)
        model = read_model(folder, precision).to(device=target)
        if (parameter := next(model.parameters(), None)) is not None:  # an n-gram model has none
            model.compute_dtype = parameter.dtype
        return cls(model, Tokenizer.load(folder), kind=source.kind, folder=folder)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def vocab_size(self) -> int:
        """Rows of the model's output; may exceed the tokenizer's, and those ids are never sampled."""
        return self.model.config.vocab

    @property
    def context(self) -> int:
        """The most tokens, prompt and answer together, that the model is made for."""
        return self.model.config.context

    @property
    def is_base(self) -> bool:
        """Whether it is known never to have been trained on conversations."""
        return self.kind in BASE_KINDS

    # -- asking ------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        progress: str | None = None,
        **sampling: Any,
    ) -> list[Generation]:
        """Continue one or many prompts (text, or token ids used as they are). `sampling`: the fields of
        `SamplingParams`; or else `params`, one for all or one for each prompt. Returns `n` answers for each prompt,
        side by side, in the order of the prompts. An encoder–decoder reads each prompt as its source and writes an answer.

        At most `batch_size` rows run together. `progress` names a bar that shows how many are done. Raises
        `UserError` for a prompt that fills the context; an answer that reaches the context's end stops there, with
        `finish_reason="length"`."""
        rows = [self.prompt_ids(prompt) for prompt in _as_list(prompts)]
        return self._generate(rows, _each(params, sampling, len(rows)), batch_size, progress)

    def stream(self, prompt: Prompt, **sampling: Any) -> Iterator[str]:
        """The continuation in pieces, whose join is the `text` of `generate`. No piece ends inside a character."""
        return self._stream(self.prompt_ids(prompt), SamplingParams.of(**sampling))

    def chat(self, messages: Messages, **sampling: Any) -> Generation:
        """The assistant's next turn in a conversation of {"role", "content"}."""
        return self.chat_batch([messages], **sampling)[0]

    def chat_batch(
        self,
        conversations: Sequence[Messages],
        *,
        batch_size: int = BATCH_SIZE,
        progress: str | None = None,
        **sampling: Any,
    ) -> list[Generation]:
        """`chat` for many conversations at once; with `n`, that many answers for each, side by side."""
        rows = [self.chat_ids(messages) for messages in conversations]
        return self._generate(rows, _each(None, sampling, len(rows)), batch_size, progress)

    def chat_stream(self, messages: Messages, **sampling: Any) -> Iterator[str]:
        """`chat` in pieces."""
        return self._stream(self.chat_ids(messages), SamplingParams.of(**sampling))

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """A prompt as the model reads it: text behind one `<|bos|>` where its tokenizer adds one; ids as they are. What an
        encoder reads is a whole text, with what its tokenizer puts before and after one."""
        if not isinstance(prompt, str):
            return [int(token) for token in prompt]
        if self.model.config.reads_source:
            before, after = self.tokenizer.frame
            return before + self.tokenizer.encode(prompt) + after
        bos = self.tokenizer.bos_id if self.tokenizer.add_bos else None
        return ([] if bos is None else [bos]) + self.tokenizer.encode(prompt)

    def chat_ids(self, messages: Messages) -> list[int]:
        """A conversation as the model reads it, up to where the assistant's next turn begins."""
        if not messages:
            raise UserError("a conversation needs at least one message")
        if self.is_base:
            warnings.warn("this is a base model, never trained on conversations: expect a continuation", stacklevel=3)
        return self.tokenizer.render(messages, add_generation_prompt=True).ids.tolist()

    def _generate(
        self, prompts: list[list[int]], params: list[SamplingParams], batch_size: int, progress: str | None
    ) -> list[Generation]:
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: at least one row must run")
        requests = [self._request(prompt, one, answer) for prompt, one in zip(prompts, params) for answer in range(one.n)]
        with task(progress, len(requests)) if progress else nullcontext() as bar:
            for batch in in_batches(requests, batch_size):
                before = 0
                for done in decode(self.model, batch, self.tokenizer):
                    if bar is not None and done > before:
                        bar.advance(done - before)
                        before = done
        return [request.generation() for request in requests]

    def _stream(self, prompt: list[int], params: SamplingParams) -> Iterator[str]:
        if params.n != 1 or params.logprobs is not None:
            raise UserError("a stream is the text of one answer; use generate for n or logprobs")
        request = self._request(prompt, params, incremental=True)
        for _ in decode(self.model, [request], self.tokenizer):
            if request.piece:
                yield request.piece

    def _request(self, prompt: list[int], params: SamplingParams, answer: int = 0, incremental: bool = False) -> Request:
        self.require_causal()
        if not prompt:
            raise UserError("the prompt is empty, and the tokenizer has no <|bos|> to begin with; give a token")
        source: list[int] = []
        self._check([*prompt, *params.stop_token_ids])
        if isinstance(value := self.model.config, EncoderDecoder):
            source, prompt = prompt, [value.start]
            if len(source) > value.encoder.context:
                limit = value.encoder.context
                raise UserError(f"the source has {len(source)} tokens, and the encoder reads {limit}; shorten it")
        if len(prompt) >= self.context:
            raise UserError(f"the prompt has {len(prompt)} tokens and the model's context {self.context}; shorten it")
        ends = [end for end in (self.tokenizer.eos_id, self.tokenizer.end_id) if end is not None]
        return Request(
            self.tokenizer,
            prompt,
            params,
            context=self.context,
            end_ids=ends,
            answer=answer,
            incremental=incremental,
            source=source,
        )

    def require_causal(self) -> None:
        """Raise `UserError` for a model that sees both ways: what it says of a token follows from the token itself."""
        if not self.model.config.causal:
            raise UserError(f"a model of kind {self.model.config.kind!r} sees both ways and continues no text; use embed")

    def _check(self, ids: Sequence[int]) -> None:
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise UserError(f"token id {wrong} is outside the model's vocabulary of {self.vocab_size}")

    # -- measuring ---------------------------------------------------------------------------------------------------

    def logits(self, token_ids: Tensor | Sequence[Sequence[int]] | Sequence[int]) -> Tensor:
        """(B, T) ids, or one row (T,) → (B, T, V) float32. With gradients where the caller has them enabled."""
        ids = torch.as_tensor(token_ids, dtype=torch.int64, device=self.device)
        return self.model.logits(self.model(ids if ids.ndim == 2 else ids[None]))

    def logprobs(self, texts: Prompt | Sequence[Prompt], batch_size: int = BATCH_SIZE) -> list[Tensor]:
        """For each text (or list of ids), the natural log-probability of every token that has one before it: (n,)
        float32 on the CPU. A text's n is its tokens (the first follows `<|bos|>`); of k given ids, n = k − 1."""
        self.require_causal()
        rows = [self.prompt_ids(text) for text in _as_list(texts)]
        for row in rows:
            self._check(row)
            if len(row) > self.context + 1:
                raise UserError(f"a text has {len(row)} tokens, the model's context {self.context}; cut it in windows")
        scores: list[Tensor] = [torch.empty(0)] * len(rows)
        order = sorted((i for i, row in enumerate(rows) if len(row) > 1), key=lambda i: -len(rows[i]))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            for i, score in zip(chosen, self._score([rows[i] for i in chosen])):
                scores[i] = score
        return scores

    def embed(self, texts: str | Sequence[str], pooling: Pooling | None = None, batch_size: int = BATCH_SIZE) -> Tensor:
        """One vector for each text, (n, D) float32 on the CPU. `pooling` is by default what the model's folder says in the
        layout of sentence-transformers, or else the normalised mean. Longer texts are cut at the model's limit."""
        pooling = pooling or self._stored_pooling() or Pooling()
        return embed(self.model, self.tokenizer, [texts] if isinstance(texts, str) else texts, pooling, batch_size)

    def _stored_pooling(self) -> Pooling | None:
        """What the folder says that the model was loaded from."""
        return read_pooling(self.folder) if self.folder is not None and self.folder.is_dir() else None

    @torch.inference_mode()
    def _score(self, rows: list[list[int]]) -> list[Tensor]:
        """Padding goes to the right: a causal model never sees it from the left."""
        tensors = [torch.tensor(row) for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=0).to(self.device)
        scores = scoring.log_probs(self.model, self.model(ids[:, :-1]), ids[:, 1:]).cpu()
        return [score[: len(row) - 1].clone() for row, score in zip(rows, scores)]

    # -- looking inside ----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def capture(self, prompt: Prompt, sites: Sequence[str]) -> dict[str, Tensor]:
        """Activations by site name while the model reads `prompt`: each (1, T, …). Unknown names raise `UserError`."""
        ids = self.prompt_ids(prompt)
        self._check(ids)
        with self.model.sites.capture(list(sites)) as seen:
            self.model(torch.tensor([ids], device=self.device))
        return dict(seen)

    def intervene(self, edits: Mapping[str, Callable[[Tensor], Tensor]]) -> AbstractContextManager[Any]:
        """A block in which `edits` (site name → function of the activation) change every forward pass."""
        return self.model.sites.edit(dict(edits))

    def save(self, folder: str | Path) -> None:
        """Write a folder that `load` reads: config.json, model.safetensors, tokenizer.json.

        In the layout of `transformers` where that has words for the model, else in Headspring's own."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if expresses(self.model.config):
            export_huggingface(self.model, folder, tokens=self.special_tokens())
        else:
            save_model(self.model, folder)
        self.tokenizer.save(folder)
        if (pooling := self._stored_pooling()) is not None:
            write_pooling(folder, pooling, self.model.config.width)

    def special_tokens(self) -> dict[str, Any]:
        """The ids that `transformers` wants in a config: where a text begins, ends (also a turn), and what pads."""
        tokenizer = self.tokenizer
        ends = [end for end in (tokenizer.eos_id, tokenizer.end_id) if end is not None]
        return {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends or None, "pad_token_id": tokenizer.pad_id}

    def __repr__(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return f"LanguageModel({parameters:,} parameters, {self.tokenizer!r}, context {self.context}, {self.device})"


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One text or one list of ids is one prompt."""
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _each(
    params: SamplingParams | Sequence[SamplingParams] | None, options: Mapping[str, Any], count: int
) -> list[SamplingParams]:
    """The settings of each of `count` prompts."""
    if params is None:
        return [SamplingParams.of(**options)] * count
    if options:
        raise UserError(f"give either params or options such as {next(iter(options))}, not both")
    each = [params] * count if isinstance(params, SamplingParams) else list(params)
    if len(each) != count:
        raise UserError(f"{len(each)} sampling params for {count} prompts")
    return each
