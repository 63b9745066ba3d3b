"""Freed memory is kept inside the block, and given back after it."""

import platform

import psutil
import pytest
import torch

from headspring.training.allocator import keep_freed_memory

glibc = platform.system() == "Linux" and platform.libc_ver()[0] == "glibc"


@pytest.mark.skipif(not glibc, reason="only glibc has these settings")
def test_memory_is_kept_and_given_back():
    resident = lambda: psutil.Process().memory_info().rss
    with keep_freed_memory():
        block = torch.ones(200, 1 << 18)  # 200 MB
        before = resident()
        del block
        assert resident() > before - (100 << 20)
    assert resident() < before - (100 << 20)
