"""Freed memory is kept inside the block, and given back after it."""

import platform
import subprocess
import sys
import textwrap

import pytest

glibc = platform.system() == "Linux" and platform.libc_ver()[0] == "glibc"


@pytest.mark.skipif(not glibc, reason="only glibc has these settings")
def test_memory_is_kept_and_given_back():
    """In a process of its own: where much else has run, the heap may have no room to grow, and memory comes from maps."""
    script = """
        import psutil
        import torch
        from headspring.training.allocator import keep_freed_memory

        resident = lambda: psutil.Process().memory_info().rss
        with keep_freed_memory():
            block = torch.ones(200, 1 << 18)  # 200 MB
            before = resident()
            del block
            assert resident() > before - (100 << 20), "not kept"
        assert resident() < before - (100 << 20), "not given back"
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
