"""What a float32 product is on a GPU is said, not left to torch's defaults."""

import pytest
import torch

import algorithms
from algorithms.precision import PRECISIONS, products_in


def flags() -> list[bool]:
    return [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_both_kinds_of_product_are_of_the_precision_asked_for(precision: str) -> None:
    before = flags()
    with products_in(precision, torch.device("cuda")):
        assert flags() == [precision == "tf32"] * 2
    assert flags() == before


def test_flags_come_back_after_a_fault_too() -> None:
    before = flags()
    with pytest.raises(ZeroDivisionError), products_in("tf32", torch.device("cuda")):
        raise ZeroDivisionError
    assert flags() == before


def test_a_precision_that_is_not_there_is_refused() -> None:
    with pytest.raises(algorithms.AlgorithmError, match="must be one of float32, tf32"):
        algorithms.create("maml", torch.nn.Linear(2, 2), precision="half")
