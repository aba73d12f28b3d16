"""The harness: sweeps, measurements, statistics, reports. ``python -m bench --help``."""

import datasets as _datasets

if not hasattr(_datasets, "EpisodeLoader"):
    raise ImportError(
        f"another package called 'datasets' is in the way ({_datasets.__file__}); Hugging Face's "
        "datasets and this project's cannot be imported in one process: run bench in an "
        "environment, or from a folder, where this project's own comes first"
    )
