"""What every model of the house is, whatever its family: a value that describes it, and a module that trains and answers.

    tokens (B, T) → hidden (B, T, D) → logits (B, T, V)

The forward pass stops at the hidden states, because training must never hold a full (B·T, V) float32 tensor: `scoring`
takes the head in chunks. To add a family of models: a value that derives from `Model`, a module that derives from
`ModelModule` and ends its construction with `complete()`.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from pydantic import Field
from torch import nn

from headspring.artifacts.value import Variant
from headspring.models import kernels
from headspring.models.kernels.packed import PackedMatrix
from headspring.models.part import Cost, ParameterRule, PartModule
from headspring.models.sites import Sites
from headspring.models.state import State


class Model(Variant):
    """The value of a whole model: `vocab` tokens, `width` channels, at most `context` tokens in a sequence."""

    vocab: int = Field(gt=0)
    width: int = Field(gt=0)
    context: int = Field(2048, gt=0)

    @property
    def causal(self) -> bool:
        """Whether no token sees what follows it: such a model predicts the next token, and text can be continued with it."""
        return True

    @property
    def reads_source(self) -> bool:
        """Whether it writes about another sequence, which its `forward` takes as `source`."""
        return False

    @property
    def counted(self) -> bool:
        """Whether it learns by counting documents and not by gradients."""
        return False

    def module(self) -> "ModelModule":
        """The module, with memory for its weights that nothing has filled."""
        raise NotImplementedError

    def build(self, seed: int = 0) -> "ModelModule":
        """A freshly initialised module, in float32 on the CPU. The same seed gives the same weights."""
        module = self.module()
        module.initialise(seed)
        return module


class ModelModule(PartModule):
    """The module of a `Model`. `compute_dtype` is the dtype of activations; parameters keep their own."""

    sites: Sites
    rules_by_name: dict[str, ParameterRule]
    packed_head_version: int = 0
    packed_head: PackedMatrix | None = None  # where the model is packed for serving (`packed.pack_model`)
    released: bool = False  # whether only packed weights are left

    def __init__(self, config: Model):
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.checkpoint_activations = False

    def complete(self) -> None:
        """Every parameter has a rule, and every site an owner. Raises `ValueError` where a parameter has none."""
        self.sites = Sites({prefix: (module, names) for prefix, module, names in self.owners()})
        self.rules_by_name = {}
        for prefix, module in self.named_modules():
            if isinstance(module, PartModule):
                self.rules_by_name |= {f"{prefix}.{name}".lstrip("."): rule for name, rule in module.rules().items()}
        missing = {name for name, _ in self.named_parameters()} ^ set(self.rules_by_name)
        if missing:
            raise ValueError(f"parameters without a rule, or rules without a parameter: {sorted(missing)}")
        for name, parameter in self.named_parameters():
            self.rules_by_name[name] = self.adjusted(name, parameter.shape, self.rules_by_name[name])

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Fill every parameter by its rule, in order of name."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in sorted(self.named_parameters()):
            self.rules_by_name[name].init(parameter, generator)

    # ---- what a family says of itself

    def adjusted(self, name: str, shape: Sequence[int], rule: ParameterRule) -> ParameterRule:
        """The rule of a parameter as this model wants it, given what its part declares."""
        return rule

    def owners(self) -> Iterator[tuple[str, PartModule, tuple[str, ...]]]:
        """The modules that have sites: prefix, module, names."""
        raise NotImplementedError

    def forward(
        self,
        tokens: torch.Tensor,
        state: State | None = None,
        segments: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states (B, T, D), in `compute_dtype`, of tokens (B, T) int64.

        With a `state` the tokens follow those it holds, and are added to it. `segments` (B, T) keeps packed documents
        apart. `padding` (B,) int64 counts left pads in each row; with a state it is given once, at the first call.
        """
        raise NotImplementedError

    def new_state(self, batch: int, capacity: int | None = None) -> State:
        """An empty memory for `batch` rows of up to `capacity` tokens (default: the model's context)."""
        raise NotImplementedError

    def _check_state(
        self, state: State, time: int, segments: torch.Tensor | None, padding: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The padding of the state's rows, noted with its first tokens."""
        if segments is not None:
            raise ValueError("segments cannot be used with a state: documents would see each other's cache")
        if state.length + time > self.config.context:
            raise ValueError(f"{state.length + time} tokens are more than the model's context of {self.config.context}")
        if padding is not None:
            if state.length:
                raise ValueError("padding is given with the first tokens of a state only")
            state.padding = padding
        return state.padding

    def blocks(self) -> Iterable[nn.Module]:
        """The repeated parts that `torch.compile` is worth running on."""
        raise NotImplementedError

    def ledger(self, context_length: int | None = None) -> Cost:
        """Parameters, FLOPs, activation and state bytes per token, by part, at sequences of `context_length` tokens."""
        raise NotImplementedError

    # ---- from hidden states to logits

    @property
    def output_weight(self) -> torch.Tensor | None:
        """The matrix (V, D) that turns hidden states into logits; None where they are logits already."""
        raise NotImplementedError

    @property
    def output_bias(self) -> torch.Tensor | None:
        """(V,), added to the logits."""
        return None

    @property
    def softcap(self) -> float | None:
        """Logits y become softcap · tanh(y / softcap)."""
        return None

    def head_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the head's matrix is applied to: (…, D) → (…, D)."""
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., D) → (..., V) float32."""
        hidden = self.head_input(hidden)
        if self.output_weight is None:
            return hidden.float()
        packed, learns = self.packed_head, torch.is_grad_enabled() and hidden.requires_grad
        if learns and packed is not None and packed.kind == "bf16" and not self.released:
            packed = None  # the float weights say the same, and can learn
        logits = kernels.multiply(hidden, self.output_weight, self.output_bias, packed).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    # ---- what every model can do

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @contextmanager
    def computing_in(self, dtype: torch.dtype) -> Iterator[None]:
        """Activations in `dtype` inside the block."""
        before, self.compute_dtype = self.compute_dtype, dtype
        try:
            yield
        finally:
            self.compute_dtype = before

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def __repr__(self) -> str:
        from headspring.models.drawing import draw

        return draw(self.ledger())
