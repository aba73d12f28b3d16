"""The engines against their peers: who agrees with the reference, and then who is fast.

Each subject is a process of its own (:mod:`serve`). Before any clock runs, what each computes is
held against the result of ``higher`` in float64; one that disagrees is reported and not timed. The
others take turns (A B C, A B C, ...), so that the drift of a shared machine hits all alike and
their repeats can be paired. In each turn this machine's rate of matrix products is measured too.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.environment import blas, cpu_name, git_commit
from bench.measure import CALIBRATION_PRODUCTS, CALIBRATION_SIDE, calibrate
from tests.performance.peers import engines
from tests.performance.peers.serve import SUBJECTS, THEIRS
from tests.performance.peers.work import (
    BASE,
    GROWTH,
    SETTINGS,
    Arrays,
    Work,
    relative_error,
)

ROOT = Path(__file__).resolve().parents[3]
REFERENCE = "higher"
VERIFIED_TASKS = 3
"""Tasks on which the float64 results are compared: a wrong batching rule needs more than one."""
TOLERANCE = {"float64": 1e-8, "float32": 1e-2}
"""Bounds on the relative error: of :data:`VERIFIED_TASKS`, and of the whole work that is timed."""
FEWEST, MOST = 6, 30
"""Rounds: six is the least that a 95% interval of a median can be had from."""
GROWTH_ROUNDS = 3
PRODUCT_FLOPS = 2 * CALIBRATION_PRODUCTS * CALIBRATION_SIDE**3

Say = Callable[[str], None]


class SubjectError(RuntimeError):
    """A subject could not do what it was asked; the message says why."""


class Subject:
    """The other end of a subject's process."""

    def __init__(self, name: str, python: Path, threads: int) -> None:
        self.name = name
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - until close()
        self.process = subprocess.Popen(
            [str(python), "-m", "tests.performance.peers.serve", name, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu"},
        )

    def tell(self, *question: Any) -> None:
        """Ask without waiting for the answer, which :meth:`hear` brings."""
        with suppress(BrokenPipeError):  # it died; :meth:`hear` says why
            pickle.dump(question, self.process.stdin)
            self.process.stdin.flush()

    def hear(self) -> Any:
        try:
            status, answer = pickle.load(self.process.stdout)
        except EOFError:
            raise SubjectError(self._last_words()) from None
        if status == "failed":
            raise SubjectError(answer)
        return answer

    def ask(self, *question: Any) -> Any:
        self.tell(*question)
        return self.hear()

    def close(self) -> None:
        """End the process, which has nothing to lose."""
        self.process.kill()
        self.process.wait()
        for end in (self.process.stdin, self.process.stdout, self.errors):
            with suppress(BrokenPipeError):
                end.close()

    def _last_words(self) -> str:
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "its process died; perhaps of too little memory"


class Comparison:
    """What is compared, on what terms.

    Args:
        names: the subjects; the reference is always among them.
        peers: the folder of the environment with other people's packages.
        threads: of each subject.
        seconds: about how long the timed rounds of one setting take.
        say: told of each thing that is done.
    """

    def __init__(
        self, names: Sequence[str], peers: Path, threads: int, seconds: float, say: Say
    ) -> None:
        self.names = [REFERENCE, *(name for name in names if name != REFERENCE)]
        self.peers = peers
        self.threads = threads
        self.seconds = seconds
        self.say = say
        self.versions: dict[str, str] = {}

    def run(self, settings: Sequence[str], growth: bool) -> dict[str, Any]:
        """All that was measured, as it goes into a JSON file."""
        torch.set_num_threads(self.threads)
        works = {name: engines.work_of(SETTINGS[name]) for name in settings}
        verified = self.verify(works)
        return {
            "settings": {name: self.timed(name, works[name], verified[name]) for name in works},
            "growth": self.growth() if growth else [],
            "made": self.made(),
        }

    def verify(self, works: dict[str, Work]) -> dict[str, dict[str, float | str]]:
        """For each work and subject the relative error in float64 on a few tasks, or why there is
        none."""
        found: dict[str, dict[str, float | str]] = {name: {} for name in works}
        with ExitStack() as stack:
            subjects = [stack.enter_context(self.started(name)) for name in self.names]
            for subject in subjects:
                subject.tell("version")
            here = [s for s in subjects if self._noted_version(s, found)]
            for key, work in works.items():
                self.say(f"{key}: the same in float64?")
                few = work.of("float64", tasks=VERIFIED_TASKS)
                for subject in here:  # all at once: nothing is timed
                    subject.tell("load", key, few)
                    subject.tell("answer", key)
                answers = {subject.name: _answered(subject) for subject in here}
                expected = answers[REFERENCE]
                if isinstance(expected, str):
                    raise SubjectError(f"the reference failed on {key}: {expected}")
                for name, answer in answers.items():
                    found[key][name] = _error(answer, expected)
        return found

    def _noted_version(self, subject: Subject, found: dict[str, dict[str, float | str]]) -> bool:
        try:
            self.versions[subject.name] = subject.hear()
        except SubjectError as error:
            for errors in found.values():
                errors[subject.name] = str(error)
            return False
        return True

    def timed(self, key: str, work: Work, errors: dict[str, float | str]) -> dict[str, Any]:
        """Times, memory and agreement of the subjects on one work."""
        rows: dict[str, Any] = {}
        for name, error in errors.items():
            rows[name] = {"error_float64": error} if isinstance(error, float) else {"why": error}
            if isinstance(error, float) and not error < TOLERANCE["float64"]:
                rows[name]["why"] = f"wrong: its relative error in float64 is {error:.1e}"
            if "why" in rows[name]:
                self.say(f"{key}: {name} is not timed: {rows[name]['why']}")
        with ExitStack() as stack:
            subjects = [
                stack.enter_context(self.started(name)) for name in rows if "why" not in rows[name]
            ]
            for subject in subjects:  # all at once: what takes long is the import
                subject.tell("version")
            for subject in subjects:
                subject.hear()
            expected: Arrays = {}
            for subject in list(subjects):
                row = rows[subject.name]
                try:
                    row["prepare_seconds"] = subject.ask("load", key, work)
                    answer = subject.ask("answer", key)
                    expected = expected or answer
                    row["error_float32"] = relative_error(answer, expected)
                    if not row["error_float32"] < TOLERANCE["float32"]:
                        off = row["error_float32"]
                        raise SubjectError(f"wrong: its relative error in float32 is {off:.1e}")
                    row |= subject.ask("memory", key) or {}
                except SubjectError as error:
                    self.say(f"{key}: {subject.name} is not timed: {error}")
                    row["why"] = str(error)
                    subjects.remove(subject)
            product_seconds = self.take_turns(key, subjects, rows)
        return {
            "setting": asdict(work.setting) | {"title": work.setting.title},
            "flops": engines.flops(work),
            "product_seconds": product_seconds,
            "subjects": rows,
        }

    def take_turns(
        self, key: str, subjects: Sequence[Subject], rows: dict[str, Any]
    ) -> list[float]:
        """Add the seconds of each subject's turns to its row; those of the matrix products."""
        calibrate("cpu")
        began = time.perf_counter()
        for subject in subjects:  # a last warming up, which tells how many rounds there is time for
            subject.ask("once", key)
        rounds = round(self.seconds / (time.perf_counter() - began))
        rounds = min(max(rounds, FEWEST), MOST)
        self.say(f"{key}: {rounds} rounds of {', '.join(s.name for s in subjects)}")
        for subject in subjects:
            rows[subject.name]["seconds"] = []
        product_seconds = []
        for _ in range(rounds):
            for subject in subjects:
                rows[subject.name]["seconds"].append(subject.ask("once", key))
            began = time.perf_counter()
            calibrate("cpu")
            product_seconds.append(time.perf_counter() - began)
        return product_seconds

    def growth(self) -> list[dict[str, Any]]:
        """Times of the engines as tasks, steps, shots and ways grow, one at a time."""
        works = {
            (axis, value): engines.work_of(replace(BASE, **{axis: value}))
            for axis, values in GROWTH.items()
            for value in values
        }
        with ExitStack() as stack:
            names = ("batched", "higher")
            subjects = [stack.enter_context(self.started(name)) for name in names]
            for (axis, value), work in works.items():
                answers = []
                for subject in subjects:
                    subject.ask("load", f"{axis} {value}", work)
                    answers.append(subject.ask("answer", f"{axis} {value}"))
                if not relative_error(*answers) < TOLERANCE["float32"]:
                    raise SubjectError(f"the engines differ at {axis} {value}")
            self.say(f"growth: {GROWTH_ROUNDS} rounds of {len(works)} sizes")
            rows = [
                {"axis": axis, "value": value, "engine": subject.name, "seconds": []}
                for axis, value in works
                for subject in subjects
            ]
            by_name = {subject.name: subject for subject in subjects}
            for _ in range(GROWTH_ROUNDS):
                for row in rows:
                    key = f"{row['axis']} {row['value']}"
                    row["seconds"].append(by_name[row["engine"]].ask("once", key))
        return rows

    def made(self) -> dict[str, Any]:
        """On what this was measured."""
        return {
            "commit": git_commit(),
            "cpu": cpu_name(),
            "threads": self.threads,
            "blas": blas(),
            "python": sys.version.split()[0],
            "packages": {
                **{name: version(name) for name in ("torch", "higher")},
                **{name: known for name, known in self.versions.items() if name in THEIRS},
            },
            "product_flops": PRODUCT_FLOPS,
        }

    @contextmanager
    def started(self, name: str) -> Iterator[Subject]:
        """A subject's process, ended with the block."""
        python = Path(sys.executable)
        if name in THEIRS:
            python = self.peers / "bin" / "python"
        subject = Subject(name, python, self.threads)
        try:
            yield subject
        finally:
            subject.close()


def subjects_here(peers: Path) -> list[str]:
    """The subjects that can run: without the peers' environment those that need none of it."""
    installed = (peers / "bin" / "python").exists()
    return [name for name in SUBJECTS if installed or name not in THEIRS]


def _answered(subject: Subject) -> Arrays | str:
    """A loading and an answer that were asked for: the answer, or why there is none."""
    why = ""
    try:
        subject.hear()
    except SubjectError as error:
        why = str(error)
    try:
        return why or subject.hear()
    except SubjectError as error:
        return str(error)


def _error(answer: Arrays | str, expected: Arrays) -> float | str:
    return answer if isinstance(answer, str) else relative_error(answer, expected)
