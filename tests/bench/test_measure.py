"""Measurements are of what they say: repeats in turns, in processes of their own."""

import mmap
import multiprocessing
import os
import signal
from pathlib import Path

import pandas as pd
import pytest
import torch

import datasets
from bench import measure
from bench.errors import CellError, SourceChangedError
from bench.sweep import Cell, Sweep
from tests.accelerator import DEVICE, accelerator
from tests.bench.conftest import TINY, measured_here


def test_every_repeat_of_every_cell_is_kept_and_counted_alike(cell: Cell) -> None:
    other = cell.model_copy(update={"algorithm": "fomaml"})
    first, second = measure.measure([cell, other], plugin=TINY)
    for whole in (first, second):
        growing = whole["phase"] == measure.GROWTH
        growth, found = whole[growing], whole[~growing]
        assert found.groupby("phase")["repeat"].apply(list).to_dict() == {
            phase: list(range(measure.REPEATS))
            for phase in (measure.STEP, measure.EVALUATION, measure.CALIBRATION)
        }
        assert (found[["seconds", "process_seconds", "flops"]] > 0).all(axis=None)
        peaks = found.groupby("phase")["peak_bytes"]
        assert peaks.count().eq(measure.PEAKS).all()
        assert peaks.min().ge(0).all()
        assert growth["inner_steps"].tolist() == list(measure.GROWTH_STEPS)
    assert first["session"].unique() == second["session"].unique()
    # Second order costs more arithmetic than first order, and evaluation the same.
    flops = [f.groupby("phase")["flops"].first() for f in (first, second)]
    assert flops[0][measure.STEP] > flops[1][measure.STEP]
    assert flops[0][measure.EVALUATION] == flops[1][measure.EVALUATION]
    headline = measure.headline(first)
    assert headline["step_gflops"] == pytest.approx(flops[0][measure.STEP] / 1e9)
    assert set(headline) >= {"step_ms", "eval_ms_per_episode", "peak_memory_bytes"}


def test_the_processes_compute_with_as_many_threads_as_their_run(cell: Cell) -> None:
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            with measure._subject(cell, None, TINY) as subject:
                assert measure._ask(subject, "threads") == count
        finally:
            torch.set_num_threads(threads)


def test_memory_grows_with_inner_steps_that_are_differentiated_and_kept() -> None:
    settings = {"devices": ["cpu"], "test_shots": 15, "shots": [5]}
    again = {"hyperparameters": {"checkpoint_inner": True}}
    cells = [
        *Sweep(algos=["maml", "fomaml"], **settings).cells(),
        *Sweep(algos=["maml"], **settings, **again).cells(),
    ]
    peaks = []
    for cell in cells:
        with measure._subject(cell, None, None) as subject:
            rows = measure._ask(subject, "growth")
        peaks.append({row["inner_steps"]: row["peak_bytes"] for row in rows})
    second_order, first_order, computed_again = (peak[8] - peak[2] for peak in peaks)
    assert second_order > 20 * 2**20
    assert first_order < 0.3 * second_order
    # Steps keep nothing but weights then, but the allocator's blocks fit one another less well.
    assert computed_again < 0.75 * second_order


class StandIn:
    """A device layer that keeps a diary, and a clock of its own."""

    def __init__(self) -> None:
        self.diary: list[str] = []
        self.now = 0.0
        self.energy = 100.0

    def synchronize(self, device: torch.device) -> None:
        self.diary.append("synchronize")

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.diary.append("reset")

    def memory_allocated(self, device: torch.device) -> int:
        return 600

    def max_memory_allocated(self, device: torch.device) -> int:
        return 1000

    def max_memory_reserved(self, device: torch.device) -> int:
        return 2000

    def event(self) -> "StandIn.Event":
        return StandIn.Event(self)

    class Event:
        def __init__(self, layer: "StandIn") -> None:
            self.layer = layer

        def record(self) -> None:
            self.layer.diary.append("record")
            self.at = self.layer.now

        def elapsed_time(self, later: "StandIn.Event") -> float:
            return later.at - self.at


def test_an_accelerator_is_timed_by_events_between_synchronisations() -> None:
    layer = StandIn()
    meter = measure.AcceleratorMeter(torch.device("meta"), layer, layer.event, lambda: layer.energy)
    meter.start()
    layer.diary.append("work")
    layer.now += 250.0  # milliseconds
    layer.energy += 3.0
    taken = meter.stop()
    diary = ["synchronize", "reset", "record", "work", "record", "synchronize"]
    assert layer.diary == diary
    assert taken["seconds"] == 0.25
    assert 0 <= taken["wall_seconds"] < 0.25
    assert (taken["peak_bytes"], taken["reserved_bytes"]) == (
        400,
        2000,
    )  # a data set is not a step's
    assert taken["joules"] == pytest.approx(3.0)


def test_of_what_is_recorded_work_is_counted_and_memory_is_not_told(
    cell: Cell, monkeypatch
) -> None:
    """The allocator, and torch's counter, see nothing of a graph that is launched whole."""
    layer = StandIn()
    made = {"layer": layer, "event": layer.event, "joules": lambda: None}
    monkeypatch.setattr(
        measure, "meter_for", lambda device: measure.AcceleratorMeter(torch.device(device), **made)
    )
    with accelerator():
        source = datasets.get("tiny")().load("train").to(DEVICE)
        plain, recorded = (
            measure.Subject(
                cell.model_copy(
                    update={
                        "device": DEVICE,
                        "hyperparameters": {**cell.hyperparameters, "cuda_graphs": graphs},
                    }
                ),
                source,
            )
            for graphs in (False, True)
        )
        for phase in (measure.STEP, measure.EVALUATION):
            assert plain.once(phase, 0)["peak_bytes"] == 400
            assert recorded.once(phase, 0)["peak_bytes"] is None
            assert recorded.once(phase, 0)["reserved_bytes"] == 2000
            assert recorded.flops(phase) == plain.flops(phase) > 0
        assert len(recorded.algorithm.recordings.kept) == 2
        assert len(plain.growth()) == len(measure.GROWTH_STEPS)
        assert recorded.growth() == []


def test_energy_that_no_counter_tells_is_left_empty() -> None:
    layer = StandIn()
    meter = measure.AcceleratorMeter(torch.device("meta"), layer, layer.event, lambda: None)
    meter.start()
    assert meter.stop()["joules"] is None
    assert measure.energy_joules(torch.device("cpu")) is None


def test_the_share_of_the_matrix_product_rate() -> None:
    rows = [
        (measure.STEP, 2.0, None, 10e9),
        (measure.CALIBRATION, 0.5, None, 50e9),
        (measure.EVALUATION, 1.0, None, 1e9),
    ]
    found = pd.DataFrame(rows, columns=["phase", "seconds", "peak_bytes", "flops"])
    assert measure.headline(found)["matmul_share"] == pytest.approx(0.05)


def test_flops_of_a_known_product_are_two_an_element(cell: Cell) -> None:
    source = datasets.get("tiny")().load("train")
    subject = measure.Subject(cell, source)
    subject.once = lambda phase, repeat: torch.ones(3, 5) @ torch.ones(5, 7)  # type: ignore
    assert subject.flops(measure.STEP) == 2 * 3 * 5 * 7


def test_engines_that_do_the_same_arithmetic_are_counted_alike() -> None:
    settings = {"algos": ["fomaml"], "devices": ["cpu"], "meta_batch": 2}
    source = datasets.get("glyphs")().load("train")
    counts = []
    for engine in ("higher", "batched"):
        subject = measure.Subject(Sweep(engine=engine, **settings).cells()[0], source)
        subject.once(measure.STEP, 0)  # the first step of all looks at the model, too
        counts.append([subject.flops(phase) for phase in measure.PHASES])
    assert counts[0] == counts[1]


def test_peak_memory_is_what_the_work_took() -> None:
    meter = measure.Meter()
    meter.start()
    size = 256 * 2**20
    held = torch.ones(size // 4)
    peak = meter.stop()["peak_bytes"]
    assert peak is not None
    assert size - 2**20 < peak < size + 32 * 2**20
    del held
    meter.give_back()
    meter.start()
    again = meter.stop()["peak_bytes"]
    assert again is None or again < 64 * 2**20  # the earlier peak is forgotten, or not quoted


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells them apart")
def test_pages_of_files_that_come_and_go_are_not_counted(tmp_path: Path) -> None:
    size = 128 * 2**20
    (tmp_path / "library").write_bytes(bytes(size))
    with (tmp_path / "library").open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    read = sum(pages[:: mmap.PAGESIZE])  # there when the meter is made
    meter = measure.Meter()
    pages.madvise(mmap.MADV_DONTNEED)  # and dropped
    meter.start()
    held = torch.ones(size // 8)
    peak = meter.stop()["peak_bytes"]
    assert size / 2 - 8 * 2**20 < peak < size / 2 + 32 * 2**20
    meter.start()
    read += sum(pages[:: mmap.PAGESIZE])  # and read back
    assert meter.stop()["peak_bytes"] < size / 2 + 32 * 2**20
    assert (read, held.sum()) == (0, size // 8)
    pages.close()


def test_a_cells_memory_owes_nothing_to_the_process_that_started_it(cell: Cell) -> None:
    held = torch.ones(512 * 2**20 // 4)  # half a gibibyte, here in the parent
    (found,) = measure.measure([cell], plugin=TINY)
    assert found["peak_bytes"].max() < held.nbytes / 2


def test_what_was_not_measured_is_left_out() -> None:
    rows = [(phase, 0.1, None, 1e9) for phase in measure.PHASES]
    found = pd.DataFrame(rows, columns=["phase", "seconds", "peak_bytes", "flops"])
    times = {"step_ms", "step_ms_iqr", "eval_ms_per_episode", "eval_ms_per_episode_iqr"}
    assert measure.headline(found).keys() == times | {
        *("step_gflops", "episode_gflops", "matmul_share")
    }


def test_a_time_is_quoted_as_its_median_and_spread() -> None:
    """Quartiles of 1 .. 7 are 2.5 and 5.5; one stray repeat moves neither."""
    seconds = [3.0, 1.0, 2.0, 700.0, 5.0, 6.0, 4.0]
    rows = [(phase, s, None, 1e9) for phase in measure.PHASES for s in seconds]
    found = pd.DataFrame(rows, columns=["phase", "seconds", "peak_bytes", "flops"])
    figures = measure.headline(found)
    assert (figures["step_ms"], figures["step_ms_iqr"]) == (4000, 3000)
    each = figures["eval_ms_per_episode"], figures["eval_ms_per_episode_iqr"]
    assert each == (4000 / measure.EPISODES, 3000 / measure.EPISODES)


def test_what_is_meant_for_the_run_does_not_reach_a_measuring_process(cell: Cell) -> None:
    with measure._subject(cell, None, TINY, None) as subject:
        (child,) = multiprocessing.active_children()
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(child.pid, number)
        assert measure._ask(subject, "threads") == torch.get_num_threads()


def test_who_measures_is_told_how_far_it_is(cell: Cell, monkeypatch) -> None:
    monkeypatch.setattr(measure, "_subject", measured_here)
    parts: list[tuple[int, int]] = []
    measure.measure([cell, cell], plugin=TINY, told=lambda *part: parts.append(part))
    total = parts[0][1]
    assert parts == [(done, total) for done in range(total + 1)]


def test_a_measuring_process_that_never_answers_is_a_failed_cell(cell: Cell, monkeypatch) -> None:
    monkeypatch.setattr(measure, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(measure, "PATIENCE_SECONDS", 0.05)
    ours, _theirs = multiprocessing.Pipe()
    with pytest.raises(measure.MeasuringError, match="did not answer"):
        measure._ask(measure._Asked(cell, ours), "growth")


def test_a_peak_is_measured_after_freed_memory_is_given_back(cell: Cell, monkeypatch) -> None:
    """What a process keeps of an earlier step would hide the next one's peak."""
    source = datasets.get("tiny")().load("train")
    subject = measure.Subject(cell, source)
    done: list[str] = []
    monkeypatch.setattr(subject.meter, "give_back", lambda: done.append("given back"))
    monkeypatch.setattr(subject.meter, "start", lambda: done.append("started"))
    monkeypatch.setattr(subject.meter, "stop", lambda: {"peak_bytes": 1})
    subject.peaks(0)
    assert done == ["given back", "started"] * len(measure.PHASES)
    done.clear()
    subject.growth()
    assert done == ["given back", "started"] * len(measure.GROWTH_STEPS)


def test_who_is_interrupted_waits_for_no_answer_and_leaves_no_process(
    cell: Cell, monkeypatch
) -> None:
    monkeypatch.setattr(measure, "LOOK_SECONDS", 0.01)
    with pytest.raises(KeyboardInterrupt):
        measure.measure([cell, cell], plugin=TINY, interrupted=lambda: True)
    assert not multiprocessing.active_children()


def test_other_source_is_not_measured_for_the_runs(cell: Cell) -> None:
    with pytest.raises(SourceChangedError):
        measure.measure([cell], plugin=TINY, source="what it was")


def test_a_measuring_process_that_fails_is_a_failed_cell(cell: Cell) -> None:
    broken = cell.model_copy(update={"dataset": "absent"})
    with pytest.raises(CellError, match="measuring failed: DatasetError: no dataset"):
        measure.measure([broken])


def test_cells_take_turns_and_warm_up_first(cell: Cell, monkeypatch) -> None:
    """Each round has every phase of every cell: what drifts does so for all."""
    asked: list[tuple[str, str, int]] = []
    once = measure.Subject.once

    def noted(self: measure.Subject, phase: str, repeat: int) -> dict:
        asked.append((self.cell.algorithm, phase, repeat))
        return once(self, phase, repeat)

    monkeypatch.setattr(measure.Subject, "once", noted)
    monkeypatch.setattr(measure.Subject, "peaks", lambda self, repeat: {})
    monkeypatch.setattr(measure.Subject, "flops", lambda self, phase: 0)
    monkeypatch.setattr(measure, "_subject", measured_here)
    measure.measure([cell, cell.model_copy(update={"algorithm": "fomaml"})], plugin=TINY)
    rounds = range(measure.WARM_UP + measure.REPEATS)
    assert asked == [
        (algorithm, phase, repeat)
        for repeat in rounds
        for algorithm in ("maml", "fomaml")
        for phase in measure.PHASES
    ]


def test_peak_memory_is_a_meta_steps_median() -> None:
    rows = [(measure.STEP, 0.1, peak, 1e9) for peak in (10.0, 30.0, 20.0)]
    rows += [(phase, 0.1, 900.0, 1e9) for phase in (measure.EVALUATION, measure.CALIBRATION)]
    found = pd.DataFrame(rows, columns=["phase", "seconds", "peak_bytes", "flops"])
    assert measure.headline(found)["peak_memory_bytes"] == 20


def test_what_is_measured_is_the_cells_own_after_its_growth_too(cell: Cell) -> None:
    cell = cell.model_copy(update={"train_shots": 3})
    source = datasets.get("tiny")().load("train")
    subject = measure.Subject(cell, source)
    assert len(subject.growth()) == len(measure.GROWTH_STEPS)
    assert subject.algorithm.inner_steps == cell.hyperparameters["inner_steps"]
    # Training has three shots, the test's episodes have one.
    assert (subject.batches.spec.shots, subject.eval_spec.shots) == (3, 1)
