"""Sine waves to regress, as in Finn et al. 2017 (MAML), section 5.1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from datasets.base import Dataset, register
from datasets.episodes import Batch, EpisodeSpec, Source, uniform

AMPLITUDE = (0.1, 5.0)
PHASE = (0.0, math.pi)
INPUTS = (-5.0, 5.0)


@dataclass(frozen=True)
class SinusoidSource(Source):
    """y = A sin(x - phase), with A from U[0.1, 5], phase from U[0, pi] and x from U[-5, 5]."""

    device: torch.device | str = "cpu"
    sample_shape = (1,)
    outputs = 1

    def check(self, spec: EpisodeSpec) -> None:
        """Any number of shots will do, and the ways are not used."""

    def batch(self, spec: EpisodeSpec, indices: Sequence[int]) -> Batch:
        count = spec.shots + spec.test_shots
        numbers = np.stack([uniform(spec.words(index, 2 + count)) for index in indices])
        amplitude = _between(AMPLITUDE, numbers[:, :1])
        phase = _between(PHASE, numbers[:, 1:2])
        x = _between(INPUTS, numbers[:, 2:])
        y = amplitude * np.sin(x - phase)
        inputs, targets = (
            torch.from_numpy(values[..., None]).to(self.device, torch.float32) for values in (x, y)
        )
        shots = spec.shots
        return {
            "train": (inputs[:, :shots], targets[:, :shots]),
            "test": (inputs[:, shots:], targets[:, shots:]),
        }

    def to(self, device: torch.device | str) -> SinusoidSource:
        return SinusoidSource(device)


def _between(limits: tuple[float, float], numbers: np.ndarray) -> np.ndarray:
    low, high = limits
    return low + (high - low) * numbers


@register("sinusoid")
class Sinusoid(Dataset):
    """The regression problem of the MAML paper; its episodes have ``shots`` points and one way."""

    summary = "sine waves of random amplitude and phase (regression)"

    def load(self, split: str) -> SinusoidSource:
        return SinusoidSource()
