"""Code that a user brings: the one way in for it besides entry points.

A settings file may name a plug-in, as the sweep.toml of each run does that had one. Such files come
from other hands too, and are data: what they name is run if the command line names it as well.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import algorithms
import datasets
from bench.errors import BenchError
from bench.failures import PLUGIN, failure_of


def trusted(named: Path | None, asked: Path | None) -> Path | None:
    """The plug-in to be run, if the command line asks for it.

    Args:
        named: by the settings, from wherever they are.
        asked: by the command line.

    Raises:
        BenchError: a settings file alone asks for it.
    """
    if named is not None and asked is None:
        raise BenchError(
            f"--config names the plug-in {named}, whose code would be run; if you trust it, add "
            f"--plugin {named}"
        )
    return named


def load_plugin(path: Path | None) -> None:
    """Run a Python file that registers algorithms or datasets.

    Raises:
        BenchError: a file that is absent or that fails.
    """
    if path is None:
        return
    algorithms.names(), datasets.names()  # first, so that no plug-in passes for one of them
    spec = importlib.util.spec_from_file_location(f"{PLUGIN}{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise BenchError(f"--plugin: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where pickle looks for what is of a plug-in's classes
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise BenchError(f"--plugin: {path} fails: {failure_of(error).line}") from error
