"""The certificate: a proof, on this machine and for this model, that trainer, evaluator and engine compute one function.

The same sampled answers are scored in every way that the house has: whole and alone (what all others are compared with), in a
padded batch and in packed documents as a trainer does with and without gradients, by the evaluator, and by the engine under
schedules that each add one thing (chunks, company, prefix hits, preemption, forks, threads, speculation) and then under
random ones. Log-probabilities are compared bit for bit, and tokens too, since each request's tokens follow from its seed.

Why a measurement and not a promise: whether a product gives a row the same bits in every batch depends on processor, compiler,
precision and library, and nobody can know that beforehand (see the traps in `docs/engine.md`). Where something differs the
certificate says what, by how much, and what that costs in KL; where a schedule could not bring about what it is named for,
it says so too. It is kept in the cache folder by machine, weights, kernels and version.

    KL(engine ‖ other) ≈ mean of r − 1 − log r,   r = p_other / p_engine of tokens that the engine sampled   (never negative)

What it gives up: it is a sample of schedules, not all of them; `quick=False` takes many more.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from headspring.artifacts import UserError, Value
from headspring.artifacts.environment import environment, processor_name
from headspring.artifacts.files import write_json
from headspring.inference.engine.schedules import Asked, Schedule, play, requests, threads
from headspring.inference.generation import Generation
from headspring.inference.language_model import LanguageModel
from headspring.models import kernels, scoring
from headspring.models.kernels import native
from headspring.models.model import ModelModule

REVISION = 2  # of what is checked


class Check(Value):
    """One way of computing against the reference: how many log-probabilities, the largest |Δ| among them, KL in nats a token,
    and how many answers have other tokens. `note` says what it could not bring about, or why it did not run."""

    name: str
    compared: int
    largest: float = 0.0
    kl: float = 0.0
    other_tokens: int = 0
    note: str = ""

    @property
    def equal(self) -> bool:
        return self.largest == 0.0 and self.other_tokens == 0

    def text(self) -> str:
        if self.compared == 0:
            return f"–  {self.name}: {self.note}"
        finding = f"equal, {self.compared} log-probabilities"
        if not self.equal:
            finding = f"differs by up to {self.largest:.1e} nats, KL {self.kl:.1e}"
            finding += f", {self.other_tokens} answers have other tokens" if self.other_tokens else ""
        return f"{'✓' if self.equal else '✗'}  {self.name}: {finding}{f' ({self.note})' if self.note else ''}"


class Certificate(Value):
    """`checks` are about one numerics id; `others` are other ways to compute the same function, which need not give the same
    bits and whose KL to the engine is reported."""

    numerics: str
    precision: str
    weights: str
    machine: dict[str, str | int]
    revision: int
    quick: bool
    seconds: float
    checks: tuple[Check, ...]
    others: tuple[Check, ...]
    unproved: str = ""  # why equal checks would prove nothing

    @property
    def holds(self) -> bool:
        """Whether everything that was compared is equal bit for bit, and that says something about what was not."""
        return not self.unproved and all(check.equal for check in self.checks)

    def text(self) -> str:
        """For people: a verdict, and a line a check."""
        wrong = [self.unproved] * bool(self.unproved) + [one.name for one in self.checks if not one.equal]
        verdict = "holds" if self.holds else "does not hold: " + ", ".join(wrong)
        head = [
            f"one forward, bit for bit: {verdict}",
            f"   {self.numerics}, {self.precision}, weights {self.weights[:12]}, {self.machine['processor']}",
            f"   {'quick' if self.quick else 'long'} proof, revision {self.revision}, {self.seconds:.0f} s",
        ]
        head += [check.text() for check in self.checks]
        return "\n".join(
            head + [f"   beside it, {other.name}: KL {other.kl:.1e}, largest {other.largest:.1e}" for other in self.others]
        )


def certify(lm: LanguageModel, quick: bool = True, fresh: bool = False) -> Certificate:
    """The certificate of a model that writes text: a kept one, or (also where it is asked to be `fresh`) a new one.

    Raises `UserError` for models that have none: encoders, and those that read another sequence or count."""
    lm.require_causal()
    if lm.model.config.reads_source or lm.model.config.counted:
        raise UserError(
            f"a model of kind {lm.model.config.kind!r} has no certificate: one is proved for models that continue a text"
        )
    weights, machine = weights_digest(lm.model), _machine()
    precision = _precision(lm.model)
    numerics, unproved = numerics_of(lm.model.device)
    key = repr((weights, sorted(machine.items()), numerics, precision, quick, REVISION))
    path = native.cache_folder() / "certificates" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    if not fresh and path.is_file():
        return Certificate.model_validate_json(path.read_text())
    start = time.perf_counter()
    proof = _Proof(lm, quick)
    checks, others = tuple(proof.checks()), tuple(proof.others())
    certificate = Certificate(
        numerics=numerics,
        precision=precision,
        weights=weights,
        machine=machine,
        revision=REVISION,
        quick=quick,
        seconds=time.perf_counter() - start,
        checks=checks,
        others=others,
        unproved=unproved,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, certificate.model_dump())
    return certificate


def weights_digest(model: ModelModule) -> str:
    """sha256 over every tensor that the model computes with. Of packed ones those that are no copy of a parameter."""
    total = hashlib.sha256()
    for name, module in model.named_modules():
        held: dict[str, object] = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        for attribute in ("packed", "joined", "packed_head"):
            matrix = getattr(module, attribute, None)
            if matrix is None or (matrix.kind == "bf16" and not model.released):
                continue
            tensors = matrix.values, matrix.scales, matrix.minimums
            held |= {f"{attribute}.{number}": tensor for number, tensor in enumerate(tensors)}
        addition = getattr(module, "addition", None)
        if addition is not None:  # of an adapter
            held |= {"addition.down": addition.down, "addition.up": addition.up}
        experts = getattr(module, "packed_experts", None)
        if experts is not None and (experts.kind != "bf16" or model.released):
            every = (tensor for matrix in experts.matrices for tensor in matrix.tensors.values())
            held |= {f"experts.{number}": tensor for number, tensor in enumerate(every)}
        for part, tensor in sorted(held.items()):
            if isinstance(tensor, Tensor):
                total.update(f"{name}.{part} {tensor.dtype} {tuple(tensor.shape)}".encode())
                total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def numerics_of(device: torch.device) -> tuple[str, str]:
    """The name of the kernels that compute on a device, and why they promise no equal bits; empty where they may."""
    if device.type == "cpu":
        return kernels.numerics_id(), ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    pages = "triton pages" if kernels.pages_on_gpu(torch.empty(0, device=device)) is not None else "gathered pages"
    return f"{name}, library products, {pages}", "products are a library's, which chooses how to sum by the number of rows"


def _precision(model: ModelModule) -> str:
    held = (getattr(module, name, None) for module in model.modules() for name in ("packed", "packed_experts"))
    kinds = {matrix.kind for matrix in held if matrix is not None} - {"bf16"}
    compute = str(model.compute_dtype).removeprefix("torch.")
    return f"{compute} with {' and '.join(sorted(kinds))} weights" if kinds else compute


def _machine() -> dict[str, str | int]:
    here = environment()
    return {
        "processor": processor_name(),
        "capability": str(here["cpu_capability"]),
        "threads": torch.get_num_threads(),
        "headspring": str(here["versions"]["headspring"]),
        "torch": str(here["versions"]["torch"]),
    }


class _Proof:
    """Requests, the reference's scores for their answers, and the checks."""

    def __init__(self, lm: LanguageModel, quick: bool):
        self.lm, self.quick = lm, quick
        self.threads = max(2, torch.get_num_threads())
        longest = lm.context // 2
        count, prompt, new = (5, min(80, longest), min(8, longest)) if quick else (24, min(200, longest), min(32, longest))
        self.asked: list[Asked] = requests(lm, seed=0, count=count, prompt=prompt, new=new)
        jobs, stats = play(lm, self.asked, Schedule())
        self.steps = stats.steps
        self.answers = [job.generations for job in jobs]
        self.rows = [answer.prompt_token_ids + answer.token_ids for answers in self.answers for answer in answers]
        self.sampled = [len(answer.token_ids) for answers in self.answers for answer in answers]
        self.reference = [self._alone(row) for row in self.rows]

    # ---- what is checked

    def checks(self) -> Iterator[Check]:
        packed = (getattr(module, name, None) for module in self.lm.model.modules() for name in ("packed", "packed_experts"))
        trains = not self.lm.model.released and all(matrix is None or matrix.kind == "bf16" for matrix in packed)
        for name, score in (("a padded batch", self._padded), ("packed documents", self._documents)):
            yield self._scored(f"trainer, {name}, no gradients", score)
            if trains:
                yield self._scored(f"trainer, {name}, with gradients", partial(self._learning, score))
            else:
                yield Check(name=f"trainer, {name}, with gradients", compared=0, note="quantized weights are not trained")
        yield self._scored(f"trainer, {self.threads} threads", self._threaded)
        yield self._scored("evaluator", lambda: self.lm.logprobs(self.rows))
        yield self._engine("engine, alone", Schedule(), lambda stats: "")
        for name, schedule, happened in (
            ("chunked prompts", Schedule(chunk=11), lambda stats: stats.steps > self.steps),
            ("company", Schedule(max_sequences=8, chunk=64), lambda stats: True),
            ("prefix hits", Schedule(sharing=True), lambda stats: stats.prefix_hits > 0),
            ("preemption", Schedule(max_sequences=8, room=1.0), lambda stats: stats.preemptions > 0),
            ("threads", Schedule(max_sequences=4, threads=self.threads), lambda stats: True),
            ("speculation", Schedule(speculates=True), lambda stats: True),
        ):
            yield self._engine(
                f"engine, {name}", schedule, lambda stats, happened=happened: "" if happened(stats) else "did not happen"
            )
        for seed in range(1, 3 if self.quick else 30):
            yield self._engine(f"engine, random schedule {seed}", Schedule.random(seed, self.threads), lambda stats: "")

    def others(self) -> Iterator[Check]:
        """Other kernels for the same function."""
        if kernels.numerics_id() != "plain":
            with _kernels("plain"):
                yield self._scored("plain kernels (HEADSPRING_KERNELS=plain)", lambda: [self._alone(row) for row in self.rows])
        if not self.quick:
            yield self._scored("compiled (torch.compile)", self._compiled)

    # ---- scoring

    def _targets(self, row: Sequence[int]) -> tuple[Tensor, Tensor]:
        ids = torch.tensor([list(row)], device=self.lm.device)
        return ids[:, :-1], ids[:, 1:]

    @torch.no_grad()
    def _alone(self, row: Sequence[int]) -> Tensor:
        tokens, targets = self._targets(row)
        return scoring.log_probs(self.lm.model, self.lm.model(tokens), targets)[0].cpu()

    def _padded(self) -> list[Tensor]:
        """Rows of one batch, pads on the left of the shorter ones."""
        longest = max(map(len, self.rows)) - 1
        padding = torch.tensor([longest + 1 - len(row) for row in self.rows], device=self.lm.device)
        batch = torch.zeros(len(self.rows), longest + 1, dtype=torch.int64, device=self.lm.device)
        for place, row in enumerate(self.rows):
            batch[place, longest + 1 - len(row) :] = torch.tensor(row)
        hidden = self.lm.model(batch[:, :-1], padding=padding)
        scores = scoring.log_probs(self.lm.model, hidden, batch[:, 1:]).detach().cpu()
        return [score[longest + 1 - len(row) :] for score, row in zip(scores, self.rows)]

    def _documents(self) -> list[Tensor]:
        """All rows as the documents of packed rows, each as long as the model's context allows."""
        scores: list[Tensor] = []
        for some in _bins(self.rows, self.lm.context):
            tokens, targets = (torch.cat(parts, dim=1) for parts in zip(*(self._targets(row) for row in some)))
            lengths = torch.tensor([len(row) - 1 for row in some])
            segments = torch.arange(len(some)).repeat_interleave(lengths)[None].to(self.lm.device)
            packed = scoring.log_probs(self.lm.model, self.lm.model(tokens, segments=segments), targets)[0].detach().cpu()
            scores += packed.split(lengths.tolist())
        return scores

    def _learning(self, score: Callable[[], list[Tensor]]) -> list[Tensor]:
        """As in training: the module in its training mode, and every parameter's gradient wanted."""
        model, wanted = self.lm.model, [parameter.requires_grad for parameter in self.lm.model.parameters()]
        model.train().requires_grad_(True)
        try:
            with torch.enable_grad():
                return score()
        finally:
            model.eval()
            for parameter, before in zip(model.parameters(), wanted):
                parameter.requires_grad_(before)

    def _threaded(self) -> list[Tensor]:
        with threads(self.threads):
            return [self._alone(row) for row in self.rows]

    def _compiled(self) -> list[Tensor]:
        blocks = list(self.lm.model.blocks())
        for block in blocks:
            block.compile(dynamic=True)
        try:
            return [self._alone(row) for row in self.rows]
        finally:
            for block in blocks:
                block._compiled_call_impl = None

    # ---- comparing

    def _scored(self, name: str, score: Callable[[], list[Tensor]]) -> Check:
        with torch.no_grad():
            return _compare(name, self.reference, score(), [], sampled=self.sampled)

    def _engine(self, name: str, schedule: Schedule, note: Callable[..., str]) -> Check:
        """The engine's own log-probabilities of the answers that it writes under a schedule."""
        jobs, stats = play(self.lm, self.asked, schedule)
        answers = [answer for job in jobs for answer in job.generations]
        first = [answer for answers in self.answers for answer in answers]
        same = [other.token_ids == answer.token_ids for other, answer in zip(answers, first)]
        expected = [scores[-len(answer.token_ids) :] for scores, answer in zip(self.reference, first)]
        pairs = [(scores, _written(answer)) for scores, answer, equal in zip(expected, answers, same) if equal]
        return _compare(name, [a for a, _ in pairs], [b for _, b in pairs], same, note(stats))


def _written(answer: Generation) -> Tensor:
    return torch.tensor(answer.logprobs, dtype=torch.float32)


def _compare(
    name: str,
    expected: list[Tensor],
    got: list[Tensor],
    same: list[bool],
    note: str = "",
    sampled: list[int] | None = None,
) -> Check:
    """Bit for bit: NaN and a sign of zero count as differences. The last `sampled` tokens of each (default: all) were drawn
    from the model, and only over those is the mean a KL."""
    ours, theirs = torch.cat([*expected, torch.empty(0)]), torch.cat([*got, torch.empty(0)])
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == torch.float32
    if torch.equal(ours.view(torch.int32), theirs.view(torch.int32)):
        largest, kl = 0.0, 0.0
    else:
        change = (theirs - ours).double()
        finite = bool(change.isfinite().all())
        largest = float(change.abs().max()) if finite else 1e308  # JSON has no infinity
        counts = sampled or [len(scores) for scores in expected]
        drawn = torch.cat([(b - a)[len(a) - n :].double() for a, b, n in zip(expected, got, counts)])
        kl = float((drawn.exp() - 1 - drawn).mean()) if finite else 1e308
    return Check(name=name, compared=len(ours), largest=largest, kl=kl, other_tokens=same.count(False), note=note)


def _bins(rows: Sequence[list[int]], room: int) -> Iterator[list[list[int]]]:
    some: list[list[int]] = []
    for row in rows:
        if some and sum(len(one) - 1 for one in some) + len(row) - 1 > room:
            yield some
            some = []
        some.append(row)
    yield some


@contextmanager
def _kernels(name: str) -> Iterator[None]:
    """Compute with another set of kernels inside the block."""
    before = os.environ.get("HEADSPRING_KERNELS")
    os.environ["HEADSPRING_KERNELS"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["HEADSPRING_KERNELS"]
        else:
            os.environ["HEADSPRING_KERNELS"] = before
