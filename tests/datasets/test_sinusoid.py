from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import datasets
from datasets import Batch, DatasetError

TASKS = 400


@pytest.fixture(scope="module")
def batch() -> Batch:
    return datasets.loader("sinusoid", shots=5, test_shots=20, batch_size=TASKS)[0]


def test_shapes_and_types_are_those_of_regression(batch: Batch) -> None:
    for half, shots in (("train", 5), ("test", 20)):
        for tensor in batch[half]:
            assert tensor.shape == (TASKS, shots, 1)
            assert tensor.dtype == torch.float32


def waves(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Amplitude, phase and residual of each task, by least squares on a sine and a cosine."""
    fits = []
    for x, y in zip(*(t.double().numpy() for t in batch["test"]), strict=True):
        columns = np.hstack([np.sin(x), np.cos(x)])
        (a, b), *_ = np.linalg.lstsq(columns, y[:, 0], rcond=None)
        fits.append((np.hypot(a, b), np.arctan2(-b, a), np.abs(columns @ [a, b] - y[:, 0]).max()))
    amplitude, phase, residual = np.array(fits).T
    return amplitude, phase, residual


def test_every_task_is_a_sine_wave_of_the_papers_ranges(batch: Batch) -> None:
    amplitude, phase, residual = waves(batch)
    assert residual.max() < 1e-5
    assert 0.1 - 1e-5 <= amplitude.min() < 0.3
    assert 4.8 < amplitude.max() <= 5.0 + 1e-5
    assert -1e-3 <= phase.min() < 0.1
    assert math.pi - 0.1 < phase.max() <= math.pi + 1e-3
    assert amplitude.mean() == pytest.approx(2.55, abs=0.25)
    assert phase.mean() == pytest.approx(math.pi / 2, abs=0.2)
    assert abs(np.corrcoef(amplitude, phase)[0, 1]) < 0.15


def test_support_and_query_are_points_of_one_wave(batch: Batch) -> None:
    amplitude, phase, _ = waves(batch)
    x, y = (tensor[..., 0].double().numpy() for tensor in batch["train"])
    assert np.abs(amplitude[:, None] * np.sin(x - phase[:, None]) - y).max() < 1e-4


def test_inputs_fill_their_range(batch: Batch) -> None:
    x = torch.cat([batch["train"][0], batch["test"][0]], 1)
    assert -5 <= x.min() < -4.9
    assert 4.9 < x.max() < 5
    assert x.mean().item() == pytest.approx(0, abs=0.15)
    assert len(x.unique()) > 0.99 * x.numel()


def test_a_task_is_the_same_in_batches_of_any_size(batch: Batch) -> None:
    one = datasets.loader("sinusoid", shots=5, test_shots=20)[17]
    for half in ("train", "test"):
        for alone, together in zip(one[half], batch[half], strict=True):
            assert torch.equal(alone[0], together[17])


@pytest.mark.parametrize("change", [{"seed": 1}, {"split": "test"}])
def test_another_seed_or_split_is_another_stream(batch: Batch, change: dict[str, object]) -> None:
    other = datasets.loader("sinusoid", shots=5, test_shots=20, **change)[0]  # type: ignore[arg-type]
    assert not torch.equal(other["train"][0][0], batch["train"][0][0])


def test_a_split_it_has_not_is_refused() -> None:
    with pytest.raises(DatasetError, match="sinusoid has no 'dev' split; it has train, val, test"):
        datasets.loader("sinusoid", split="dev")


def test_the_oracle_is_told_amplitude_and_phase_of_the_very_same_waves(batch: Batch) -> None:
    told = datasets.loader("sinusoid_oracle", shots=5, test_shots=20, batch_size=TASKS)[0]
    for half in ("train", "test"):
        (x, y), (inputs, targets) = batch[half], told[half]
        assert torch.equal(inputs[..., :1], x)
        assert torch.equal(targets, y)
        amplitude, phase = inputs[..., 1:2], inputs[..., 2:]
        torch.testing.assert_close(amplitude * torch.sin(x - phase), y, rtol=0, atol=1e-5)
