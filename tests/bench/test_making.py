"""A cell's figures are those of its tables."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from bench.making import Sources, Watch, train_and_evaluate
from bench.store import CHECKPOINT, SCORES, TRAINING
from bench.sweep import Cell


class Silent(Watch):
    """Nobody watches."""


def test_figures_are_of_the_last_step_of_the_test_episodes(cell: Cell, tmp_path: Path) -> None:
    sources = Sources(None, False)
    figures: dict[str, Any] = train_and_evaluate(cell, tmp_path, sources, Silent(), source="s")
    scores = pd.read_parquet(tmp_path / SCORES)
    last = scores[scores["step"] == cell.eval_steps].sort_values("episode")["metric"].to_numpy()
    assert len(last) == cell.episodes == 20
    assert figures["metric"] == "accuracy"
    assert figures["mean"] == pytest.approx(last.mean())
    low, high = stats.ttest_1samp(last, 0).confidence_interval(0.95)
    assert figures["ci95"] == pytest.approx((high - low) / 2)
    training = pd.read_parquet(tmp_path / TRAINING)
    assert len(training) == cell.iterations
    assert figures["train_seconds"] == pytest.approx(training["seconds"].sum())
    assert (tmp_path / CHECKPOINT).is_file()
    assert figures["episode_address"] == cell.test_spec.address
    # 20 episodes of 5 classes with 1 + 5 samples each; the split has 12 classes of 20.
    assert figures["sample_reuse"] == pytest.approx(20 * 5 * 6 / 240)
    assert figures["ci95_classes"] > 0
    assert not np.isclose(figures["ci95_classes"], figures["ci95"])
