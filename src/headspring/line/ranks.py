"""The line under `torchrun`: the leader does everything that is not training, the others wait at a broadcast.

Without `torchrun` there is one rank, nothing is initialised and torch is not imported. A leader that fails ends its
process, and `torchrun` ends the others.
"""

import datetime
import os
from typing import TypeVar

T = TypeVar("T")

PATIENCE = datetime.timedelta(days=7)  # how long ranks may wait for the leader's stages


class Ranks:
    """This process's place among those that run the line."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self._group = None
        if self.size > 1:
            import torch
            from torch import distributed

            if not distributed.is_initialized():
                backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
                distributed.init_process_group(backend)
            self._group = distributed.new_group(backend="gloo", timeout=PATIENCE)

    @property
    def leader(self) -> bool:
        return self.rank == 0

    def share(self, value: T) -> T:
        """The leader's `value`, on every rank. The others wait here until the leader arrives."""
        if self._group is None:
            return value
        from torch import distributed

        box = [value]
        distributed.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def wait(self) -> None:
        """Until every rank is here."""
        if self._group is not None:
            from torch import distributed

            distributed.barrier(group=self._group)
