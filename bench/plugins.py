"""Code that a user brings: the one way in for it besides entry points."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from bench.errors import BenchError


def load_plugin(path: Path | None) -> None:
    """Run a Python file that registers algorithms or datasets.

    Raises:
        BenchError: a file that is absent or that fails.
    """
    if path is None:
        return
    spec = importlib.util.spec_from_file_location(f"bench_plugin_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise BenchError(f"--plugin: {path} is not a Python file")
    try:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    except Exception as error:
        raise BenchError(f"--plugin: {path} fails: {type(error).__name__}: {error}") from error
