"""Code that a user brings: the one way in for it besides entry points."""

from __future__ import annotations

import importlib.util
import sys
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
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where pickle looks for what is of a plug-in's classes
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise BenchError(f"--plugin: {path} fails: {type(error).__name__}: {error}") from error
