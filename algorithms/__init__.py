"""Meta-learning algorithms: one file each, over one shared inner loop."""

from algorithms.base import (
    Algorithm,
    AlgorithmError,
    Scores,
    create,
    get,
    head_names,
    hyperparameter_types,
    hyperparameters,
    names,
    register,
)
from algorithms.inner_loop import Fast, Tasks

__all__ = [
    "Algorithm",
    "AlgorithmError",
    "Fast",
    "Scores",
    "Tasks",
    "create",
    "get",
    "head_names",
    "hyperparameter_types",
    "hyperparameters",
    "names",
    "register",
]
