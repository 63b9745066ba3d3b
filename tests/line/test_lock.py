"""The lock of a run folder: one process at a time, and nothing to clean up after one that was killed."""

import multiprocessing
import os
import signal
import time

import pytest

from headspring.artifacts import UserError
from headspring.artifacts.lock import folder_lock

fork = multiprocessing.get_context("fork")


def hold(folder, ready):
    with folder_lock(folder):
        ready.set()
        time.sleep(60)


def test_the_second_process_is_told_who_has_it_and_a_killed_holder_leaves_nothing(tmp_path):
    ready = fork.Event()
    holder = fork.Process(target=hold, args=(tmp_path, ready))
    holder.start()
    assert ready.wait(20)
    with pytest.raises(UserError, match=rf"another run \(process {holder.pid}\)") as caught, folder_lock(tmp_path):
        pass
    assert caught.value.exit_code == 2
    os.kill(holder.pid, signal.SIGKILL)
    holder.join(20)
    with folder_lock(tmp_path):
        pass


def test_the_lock_is_released_and_a_shorter_process_id_replaces_a_longer_one(tmp_path):
    (tmp_path / ".lock").write_text("123456789012\n")
    for _ in range(2):
        with folder_lock(tmp_path):
            assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=r"cannot be written \(.*\); give another --run-dir"), folder_lock(folder):
            pass
