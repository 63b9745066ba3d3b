"""How long and how to train: the part of a recipe that every trainer shares."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from headspring.artifacts.value import Value
from headspring.training.optimizers import Muon, OptimizerConfig
from headspring.training.schedule import Schedule, WarmupStableDecay


class TrainConfig(Value):
    """One step trains on `batch_size` samples, over all processes, in pieces of `micro_batch_size` a process.

    `minutes` cuts the run, where the machine is slow, to the steps that fit into so much training at the speed of its first
    steps; the schedule then ends there too. `precision` is the dtype of activations (parameters and optimizer stay float32);
    fp16 needs a GPU. `compile: auto` follows the rule of `training.compilation`. A run stops as diverged when the loss is not
    finite, or exceeds the median of the last 50 steps by `spike` nats. `keep_steps` are checkpoints that stay, so that a
    branch can start from them. A trainer whose rows never hold several documents is no subject of `document_mask`.
    """

    packs_documents: ClassVar[bool] = True

    steps: int = Field(400, gt=0)
    minutes: float | None = Field(None, gt=0)
    batch_size: int = Field(16, gt=0)
    micro_batch_size: int | None = Field(None, gt=0)
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    optimizer: OptimizerConfig = Muon()
    schedule: Schedule = WarmupStableDecay()
    gradient_clip: float | None = Field(1.0, gt=0)
    document_mask: bool = False
    activation_checkpointing: bool = False
    compile: Literal["auto", "never", "always"] = "auto"
    device: str = "auto"
    checkpoint_every: int = Field(100, gt=0)
    keep_checkpoints: int = Field(2, gt=0)
    keep_steps: tuple[int, ...] = ()
    log_every: int = Field(10, gt=0)
    validate_every: int = Field(100, gt=0)
    spike: float = Field(3.0, gt=0)

    @model_validator(mode="after")
    def _pieces_fit(self) -> "TrainConfig":
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError(f"micro_batch_size ({self.micro_batch_size}) exceeds batch_size ({self.batch_size})")
        if self.document_mask and not self.packs_documents:
            raise ValueError("document_mask does not apply here: each row holds one document or conversation; leave it out")
        return self
