"""The kernels on pages of a GPU: read by Triton's interpreter on a CPU, and compiled for GPUs that are not here.

The interpreter is chosen when Triton is imported, so that `triton_cases.py` runs in a process of its own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CASES = Path(__file__).with_name("triton_cases.py")


def interpret(marks: str) -> int:
    """How many of the cases passed; all of them must."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", marks, str(CASES)]
    done = subprocess.run(command, env=environment, cwd=CASES.parents[2], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


def test_the_interpreter_finds_what_is_promised():
    assert interpret("not slow") >= 7


@pytest.mark.slow
def test_all_options_and_planted_bugs():
    assert interpret("slow") >= 8


KINDS = {"bf16": "bf16", "fp16": "fp16", "fp32": "fp32", "int8 pages": "i8"}


def compiled(kind: str, capability: int) -> dict[str, str]:
    """The PTX of each kernel, for a GPU of this compute capability."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from headspring.models.kernels import triton_paged

    activations, pool = ("bf16" if kind == "int8 pages" else KINDS[kind]), KINDS[kind]
    longs = ("offsets", "past", "positions", "slots")
    ints = ("query_stride", "table_stride", "splits", "k_stride", "v_stride")
    types = dict.fromkeys(ints, "i32") | dict.fromkeys(("scale", "softcap"), "fp32") | dict.fromkeys(longs, "*i64")
    types |= dict.fromkeys(("tables", "tiles"), "*i32") | dict.fromkeys(("queries", "k", "v", "y"), f"*{activations}")
    types |= dict.fromkeys(("keys", "values"), f"*{pool}")
    constants = {"HEADS": 9, "KV_HEADS": 3, "C": 64, "CHANNELS": 64, "GROUP": 4, "QUERIES": 4, "SPLIT": 256, "PAGE": 32}
    constants |= {"WINDOW": 40, "CAPPED": True, "SCALED": pool == "i8", "WIDE": activations == "fp32", "SINKS": True}
    found = {}
    for kernel in (triton_paged.attend_splits, triton_paged.join_splits, triton_paged.write_rows):
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in names}
        given = {(place,): constants[name] for place, name in enumerate(names) if name in constants}
        made = compile(ASTSource(kernel, signature, given), GPUTarget("cuda", capability, 32), {"enable_fp_fusion": False})
        found[kernel.__name__] = made.asm["ptx"]
    return found


@pytest.mark.parametrize(
    "kind", ["bf16", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("fp16", "fp32", "int8 pages"))]
)
def test_they_compile_for_gpus(kind):
    for capability in (80, 90):
        programs = compiled(kind, capability)
        attend = programs["attend_splits"]
        assert f".target sm_{capability}" in attend
        pair = "f16.f16" if kind == "fp16" else "bf16.bf16"
        if kind != "fp32":  # in sixteen bits the matrix unit multiplies, one instruction for tiles of every step
            assert set(re.findall(r"mma\.sync[\w.]*", attend)) == {f"mma.sync.aligned.m16n8k16.row.col.f32.{pair}.f32"}
        assert "fma." not in programs["join_splits"], "a product and a sum became one"
