"""Sine waves to regress, as in Finn et al. 2017 (MAML), section 5.1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

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

    def waves(
        self, spec: EpisodeSpec, indices: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Amplitudes and phases ``(B, 1)`` of these episodes, and their points x ``(B, shots +
        test_shots)``."""
        count = spec.shots + spec.test_shots
        numbers = np.stack([uniform(spec.words(index, 2 + count)) for index in indices])
        return (
            _between(AMPLITUDE, numbers[:, :1]),
            _between(PHASE, numbers[:, 1:2]),
            _between(INPUTS, numbers[:, 2:]),
        )

    def batch(self, spec: EpisodeSpec, indices: Sequence[int]) -> Batch:
        amplitude, phase, x = self.waves(spec, indices)
        y = amplitude * np.sin(x - phase)
        inputs, targets = (
            torch.from_numpy(values).to(self.device, torch.float32)
            for values in (self.inputs(amplitude, phase, x), y[..., None])
        )
        shots = spec.shots
        return {
            "train": (inputs[:, :shots], targets[:, :shots]),
            "test": (inputs[:, shots:], targets[:, shots:]),
        }

    def inputs(self, amplitude: np.ndarray, phase: np.ndarray, x: np.ndarray) -> np.ndarray:
        """What a network is given of a wave at its points: x alone, ``(B, n, 1)``."""
        return x[..., None]

    def to(self, device: torch.device | str) -> SinusoidSource:
        return type(self)(device)


@dataclass(frozen=True)
class OracleSource(SinusoidSource):
    """The same waves and points, with each wave's amplitude and phase told beside x."""

    sample_shape = (3,)

    def waves(
        self, spec: EpisodeSpec, indices: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return super().waves(replace(spec, dataset=Sinusoid.name), indices)

    def inputs(self, amplitude: np.ndarray, phase: np.ndarray, x: np.ndarray) -> np.ndarray:
        return np.stack(np.broadcast_arrays(x, amplitude, phase), axis=-1)


def _between(limits: tuple[float, float], numbers: np.ndarray) -> np.ndarray:
    low, high = limits
    return low + (high - low) * numbers


@register("sinusoid")
class Sinusoid(Dataset):
    """The regression problem of the MAML paper; its episodes have ``shots`` points and one way."""

    summary = "sine waves of random amplitude and phase (regression)"
    regression = True

    def load(self, split: str) -> SinusoidSource:
        return SinusoidSource()


@register("sinusoid_oracle")
class SinusoidOracle(Dataset):
    """The same episodes for the paper's oracle, whose inputs are x, amplitude and phase."""

    summary = "the same sine waves, amplitude and phase told as inputs (oracle)"
    regression = True

    def load(self, split: str) -> OracleSource:
        return OracleSource()
