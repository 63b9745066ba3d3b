"""`LanguageModel`: a model, its tokenizer and its config, and everything one asks of them.

It holds no second forward pass: generating, scoring and looking inside all call the module that was trained
(`models`), and log-probabilities come from the one path (`models.scoring`). Text is typed: a prompt is encoded as
plain text behind one `<|bos|>`, as a training document is; only `chat` writes control tokens; sampled ids are never
re-encoded.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from headspring.artifacts import UserError
from headspring.artifacts.progress import task
from headspring.inference.adapters import adapted, merged
from headspring.inference.embeddings import embed, read_pooling, write_pooling
from headspring.inference.engine import Engine, EngineConfig, Job, Update
from headspring.inference.engine.submission import check_ids, require_causal
from headspring.inference.generation import Generation
from headspring.inference.inspection import Inspection
from headspring.inference.loading import BASE_KINDS, choose_device, choose_dtype, download, find
from headspring.inference.quantization.folder import save_quantized
from headspring.inference.quantization.reading import read
from headspring.inference.quantization.scheme import Quantization
from headspring.inference.sampling_params import SamplingParams
from headspring.models import save_model, scoring
from headspring.models.adapter_folder import load_adapter
from headspring.models.dialects import export_huggingface, expresses
from headspring.models.lora import Adapter
from headspring.models.model import ModelModule
from headspring.models.pooling import Pooling
from headspring.text.chat import Message
from headspring.tokenization.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Messages = Sequence[Message | Mapping[str, str]]
BATCH_SIZE = 64  # rows that run together; the state's memory grows with it
CHUNK = 512  # tokens of a step


class LanguageModel:
    """`model` (`torch.nn.Module`), `tokenizer` and `config` (pydantic), ready to be asked.

    `base` and `adapter` are set where it is another one with a LoRA adapter (`with_adapter`).
    `kind` is the stage that made it, where known: a base model (`pretrain`) warns when asked to chat. `folder` is where it
    was loaded from, and may say how its embeddings are pooled."""

    def __init__(self, model: ModelModule, tokenizer: Tokenizer, kind: str | None = None, folder: Path | None = None):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.config: BaseModel = model.config
        self.kind = kind
        self.folder = folder
        self.base: LanguageModel | None = None
        self.adapter: Adapter | None = None
        if tokenizer.vocab_size > self.vocab_size:
            raise UserError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {self.vocab_size}: not a pair")

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        quantize: str | Quantization | None = None,
        revision: str | None = None,
    ) -> "LanguageModel":
        """The model at `path`: a run folder (its last finished model stage), a stage's folder, a Hugging Face folder or
        hub name (at `revision`), or a `.gguf` file. `dtype="auto"` keeps the precision the weights are stored in.

        `quantize` computes in whole numbers, on the CPU: "int8", "int8-32", "int4", "int4-gptq", "int4-gptq-64" and so on round
        the weights; "keep" takes the blocks of a `.gguf` file as they are, "auto" too where that is fast; None makes floats of
        them. `dtype` is then that of the activations (bfloat16). Raises `UserError`."""
        target, precision = choose_device(device), choose_dtype(dtype)
        source = find(path)
        if revision is not None and source.folder is not None:
            raise UserError(f"revision={revision!r} belongs to a hub name; {source.name} is on this machine")
        folder = source.folder or download(source.name, revision)
        with ThreadPoolExecutor(1) as pool:  # a vocabulary takes as long as the weights, on another core
            reading = pool.submit(Tokenizer.load, folder)
            model = read(folder, precision, quantize, reading.result)
            tokenizer = reading.result()
        if target.type != "cpu" and model.released:
            raise UserError(
                f"{source.name}: whole numbers are multiplied on the CPU only; use device='cpu', or the float model"
            )
        return cls(model.to(device=target), tokenizer, kind=source.kind, folder=folder)

    def with_adapter(self, adapter: str | Path | Adapter) -> "LanguageModel":
        """This model with a LoRA adapter (a folder in PEFT's layout, or one made by `LoRA`), as another model that shares all
        weights with it: for a hundredth of its memory it answers, scores and embeds in its own way. Raises `UserError`."""
        if self.adapter is not None:
            raise UserError("this model has an adapter already; take its base, or the model that merged() gives")
        value = adapter if isinstance(adapter, Adapter) else load_adapter(adapter, self.model)
        other = LanguageModel(adapted(self.model, value), self.tokenizer, self.kind, self.folder)
        other.base, other.adapter = self, value
        return other

    def merged(self) -> "LanguageModel":
        """The model with its adapter's product in the place of each weight, for a folder of its own. The adapter is then gone,
        and the base as it was."""
        if self.base is None or self.adapter is None:
            raise UserError("merged() is for a model with_adapter(...); this one has none")
        return LanguageModel(merged(self.base.model, self.adapter), self.tokenizer, self.kind, self.folder)

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
        edits: Inspection | None = None,
        **sampling: Any,
    ) -> list[Generation]:
        """Continue one or many prompts (text, or token ids used as they are). `sampling`: the fields of
        `SamplingParams`; or else `params`, one for all or one for each prompt. Returns `n` answers for each prompt,
        side by side, in the order of the prompts. An encoder–decoder reads each prompt as its source and writes an answer.

        At most `batch_size` rows run together. `progress` names a bar that shows how many are done. `edits` look inside
        while each answer is written, or change what is inside (`Generation.seen`). Raises
        `UserError` for a prompt that fills the context; an answer that reaches the context's end stops there, with
        `finish_reason="length"`."""
        rows = [self.prompt_ids(prompt) for prompt in _as_list(prompts)]
        return self._generate(rows, _each(params, sampling, len(rows)), batch_size, progress, edits)

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

    def engine(self, **options: Any) -> Engine:
        """An engine for this model, to submit requests to one by one. `options`: the fields of `EngineConfig`. It keeps what
        the model made of prompts; give up an engine when the weights have changed."""
        return Engine(self.model, self.tokenizer, EngineConfig.of(**options))

    def _generate(
        self,
        prompts: list[list[int]],
        params: list[SamplingParams],
        batch_size: int,
        progress: str | None,
        edits: Inspection | None = None,
    ) -> list[Generation]:
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: at least one row must run")
        if not prompts:
            return []
        asked = list(zip(prompts, params))
        engine = self._engine_for(asked, batch_size)
        jobs: dict[int, Job] = {}
        # The longest first: what does not fit in memory shows at once, and the last ones to run are short.
        for i in sorted(range(len(asked)), key=lambda i: -len(prompts[i])):
            jobs[i] = self._submit(engine, *asked[i], edits=edits)
        with task(progress, sum(one.n for one in params)) if progress else nullcontext() as bar:
            before = 0
            while engine.step():
                if engine.counts["failed"]:
                    break
                if bar is not None and engine.counts["finished"] > before:
                    before, ended = engine.counts["finished"], before
                    bar.advance(sum(one.n for one in params) * (before - ended) / len(jobs))
        for job in jobs.values():
            if job.error is not None:
                raise job.error
        return [answer for i in range(len(asked)) for answer in jobs[i].generations]

    def _engine_for(self, asked: Sequence[tuple[list[int], SamplingParams]], batch_size: int, **options: Any) -> Engine:
        """An engine with room for these prompts."""
        answers = min(batch_size, sum(params.answers for _, params in asked))
        written = 1 if self.model.config.reads_source else 0
        longest = max((written or len(prompt)) + params.max_tokens for prompt, params in asked)
        context = max(2, min(longest, self.context))
        return self.engine(max_sequences=answers, chunk=max(CHUNK, answers), context=context, **options)

    def _submit(
        self,
        engine: Engine,
        prompt: list[int],
        params: SamplingParams,
        notify: Callable[[Update], None] | None = None,
        edits: Inspection | None = None,
    ) -> Job:
        """Ask for a prompt; an encoder–decoder reads it as its source."""
        if self.model.config.reads_source:
            return engine.submit((), params, source=prompt, notify=notify, edits=edits)
        return engine.submit(prompt, params, notify=notify, edits=edits)

    def _stream(self, prompt: list[int], params: SamplingParams) -> Iterator[str]:
        if params.answers != 1 or params.logprobs is not None or params.prompt_logprobs is not None:
            raise UserError("a stream is the text of one answer; use generate for several, and for logprobs")
        engine = self._engine_for([(prompt, params)], 1)
        pieces: list[str] = []
        job = self._submit(engine, prompt, params, notify=lambda update: pieces.append(update.text))
        going = True
        while going:
            going = engine.step()
            yield from filter(None, pieces)
            pieces.clear()
        if job.error is not None:
            raise job.error

    def require_causal(self) -> None:
        """Raise `UserError` for a model that sees both ways: what it says of a token follows from the token itself."""
        require_causal(self.model.config)

    def _check(self, ids: Sequence[int]) -> None:
        check_ids(ids, self.vocab_size)

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

        In the layout of `transformers` where that has words for the model, else in Headspring's own; a model of whole numbers
        in that of `inference.quantization.folder`. An adapter is merged into what is written."""
        if self.adapter is not None:
            return self.merged().save(folder)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        theirs = not self.model.released and expresses(self.model.config) is not None
        if self.model.released:
            save_quantized(self.model, folder)
        elif theirs:
            export_huggingface(self.model, folder, tokens=self.special_tokens())
        else:
            save_model(self.model, folder)
        self.tokenizer.save(folder, prompt_start=theirs and self.model.config.causal)
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
