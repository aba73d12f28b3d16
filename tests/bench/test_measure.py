"""Measurements are of what they say: repeats in turns, in processes of their own."""

import pandas as pd
import pytest
import torch

import datasets
from bench import measure
from bench.errors import CellError
from bench.sweep import Cell
from tests.bench.conftest import TINY


def test_every_repeat_of_every_cell_is_kept_and_counted_alike(cell: Cell) -> None:
    other = cell.model_copy(update={"algorithm": "fomaml"})
    first, second = measure.measure([cell, other], plugin=TINY)
    for found in (first, second):
        assert found.groupby("phase")["repeat"].apply(list).to_dict() == {
            phase: list(range(measure.REPEATS))
            for phase in (measure.STEP, measure.EVALUATION, measure.CALIBRATION)
        }
        assert (found[["seconds", "process_seconds", "flops"]] > 0).all(axis=None)
        assert found["peak_bytes"].ge(0).all()
    assert first["session"].unique() == second["session"].unique()
    # Second order costs more arithmetic than first order, and evaluation the same.
    flops = [f.groupby("phase")["flops"].first() for f in (first, second)]
    assert flops[0][measure.STEP] > flops[1][measure.STEP]
    assert flops[0][measure.EVALUATION] == flops[1][measure.EVALUATION]
    headline = measure.headline(first)
    assert headline["step_gflops"] == pytest.approx(flops[0][measure.STEP] / 1e9)
    assert set(headline) >= {"step_ms", "eval_ms_per_episode", "peak_memory_bytes"}


def test_flops_of_a_known_product_are_two_an_element(cell: Cell) -> None:
    source = datasets.get("tiny")().load("train")
    subject = measure.Subject(cell, source)
    subject.once = lambda phase, repeat: torch.ones(3, 5) @ torch.ones(5, 7)  # type: ignore
    assert subject.flops(measure.STEP) == 2 * 3 * 5 * 7


def test_peak_memory_is_what_the_work_took() -> None:
    meter = measure.Meter()
    meter.start()
    size = 256 * 2**20
    held = torch.ones(size // 4)
    peak = meter.peak_bytes()
    assert peak is not None
    assert size - 2**20 < peak < size + 32 * 2**20
    del held
    meter.start()
    again = meter.peak_bytes()
    assert again is None or again < 64 * 2**20  # the earlier peak is forgotten, or not quoted


def test_what_was_not_measured_is_left_out() -> None:
    rows = [(phase, 0.1, None, 1e9) for phase in (measure.STEP, measure.EVALUATION)]
    found = pd.DataFrame(rows, columns=["phase", "seconds", "peak_bytes", "flops"])
    assert measure.headline(found).keys() == {"step_ms", "eval_ms_per_episode", "step_gflops"}


def test_a_measuring_process_that_fails_is_a_failed_cell(cell: Cell) -> None:
    broken = cell.model_copy(update={"dataset": "absent"})
    with pytest.raises(CellError, match="measuring failed: DatasetError: no dataset"):
        measure.measure([broken])
