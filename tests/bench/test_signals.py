"""Ctrl-C and SIGTERM reach who can deal with them, and nobody else."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.signals import interruptible

ROOT = Path(__file__).resolve().parents[2]
FIRST_CHILDREN = """
import multiprocessing
import signal

from bench.signals import STOPPING, unsignalled


def tell(connection):
    connection.send(signal.pthread_sigmask(signal.SIG_BLOCK, []))


if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    for _ in range(2):
        ours, theirs = context.Pipe()
        child = context.Process(target=tell, args=(theirs,))
        with unsignalled():
            child.start()
        assert set(STOPPING) <= ours.recv(), "it would be stopped"
        child.join()
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, []), "the parent hears nothing"
"""


def test_no_child_is_signalled_not_even_a_processs_first(tmp_path: Path) -> None:
    """With the first, multiprocessing starts a helper, and then lets both signals through."""
    script = tmp_path / "first.py"
    script.write_text(FIRST_CHILDREN)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_first_is_a_question_and_the_second_an_end(capfd) -> None:
    with interruptible() as interrupted:
        assert not interrupted()
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupted()
        assert "stopping at the next safe point" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with interruptible(silent=True):
        os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err == ""
