"""The harness: sweeps, measurements, statistics, reports. ``python -m bench --help``."""

import sys

import datasets as _datasets

if not hasattr(_datasets, "EpisodeLoader"):
    _MESSAGE = (
        f"another package called 'datasets' is in the way ({_datasets.__file__}); Hugging Face's "
        "datasets and this project's cannot be imported in one process: run bench in an "
        "environment, or from a folder, where this project's own comes first"
    )
    if sys.argv[0] == "-m":  # python -m bench, which imports this before bench/__main__.py
        print(f"bench: {_MESSAGE}", file=sys.stderr)
        sys.exit(2)
    raise ImportError(_MESSAGE)
