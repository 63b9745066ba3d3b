"""What a CUDA graph is, on a CPU: a list of operators with the tensors that they read and wrote, run again in the same memory.

Whatever Python decided while it was recorded stays decided, and a tensor that was made from Python's numbers, or a number that
was asked for, breaks the recording: on a GPU those would be copies to and from the device.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

FORBIDDEN = ("aten::lift_fresh", "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero")


class Tape(TorchDispatchMode):
    current = None

    def __init__(self):
        super().__init__()
        self.steps = []

    def __enter__(self):
        Tape.current = self
        return super().__enter__()

    def __exit__(self, *error):
        Tape.current = None
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in FORBIDDEN:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func._schema.name}")
        result = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, result))
        return result

    def replay(self):
        for func, args, kwargs, result in self.steps:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again)):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def recorded(launch):
    """`triton_paged.launch`, whose kernels become steps of a tape too."""

    def run(kernel, grid, *arguments, **constants):
        if Tape.current is not None:
            Tape.current.steps.append((run, (kernel, grid, *arguments), constants, None))
        with _disable_current_modes():
            launch(kernel, grid, *arguments, **constants)

    return run


class Recorder:
    """A `graphs.Backend`; `captured` and `replayed` count."""

    def __init__(self):
        self.captured = self.replayed = 0

    def capture(self, run):
        run()
        with Tape() as tape:
            output = run()
        self.captured += 1

        def replay():
            self.replayed += 1
            tape.replay()

        return output, replay
