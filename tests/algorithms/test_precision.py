"""In what precision products are taken is said, not left to torch's defaults."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import algorithms
from algorithms.models import build
from algorithms.precision import factor, products_in, unrounded


def flags() -> list[bool]:
    return [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]


@pytest.mark.parametrize("precision", ["float32", "tf32"])
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
    with pytest.raises(algorithms.AlgorithmError, match="must be one of float32, tf32, bf16"):
        algorithms.create("maml", torch.nn.Linear(2, 2), precision="half")


def meta_gradient(engine: str, precision: str) -> torch.Tensor:
    """MAML's, of the Omniglot network on noise that has something to tell classes apart by."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.rand(4, 5, 1, 28, 28, generator=generator)
    noisy = [classes + 0.3 * torch.rand(classes.shape, generator=generator) for _ in range(2)]
    labels = torch.arange(5).expand(4, 5)
    model = build("conv4", (1, 28, 28), 5, seed=0)
    maml = algorithms.create("maml", model, engine=engine, precision=precision)
    maml.meta_backward({"train": (noisy[0], labels), "test": (noisy[1], labels)})
    return torch.cat([parameter.grad.flatten() for parameter in maml.parameters()])


def test_in_bf16_engines_agree_with_each_other_better_than_with_float32() -> None:
    """What 8 bits of factors do to a gradient is not small, but it is the same in both."""
    batched, higher = (meta_gradient(engine, "bf16") for engine in ("batched", "higher"))
    exact = meta_gradient("higher", "float32")
    assert batched.dtype == higher.dtype == torch.float32
    apart, rounded = (batched - higher).norm(), (higher - exact).norm()
    assert apart < 0.5 * rounded
    assert 1e-3 * exact.norm() < rounded < 0.3 * exact.norm()


class Products(TorchDispatchMode):
    """The types of the factors of all products that are computed within."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm", "convolution"):
            self.types |= {each.dtype for each in args if isinstance(each, torch.Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("engine", ["batched", "higher"])
def test_in_bf16_no_product_is_left_in_float32_and_no_mean_is_taken_of_rounded_values(
    engine: str,
) -> None:
    generator = torch.Generator().manual_seed(0)
    batch = {
        half: (torch.rand(3, 5, 1, 28, 28, generator=generator), torch.arange(5).expand(3, 5))
        for half in ("train", "test")
    }
    model = build("conv4", (1, 28, 28), 5, seed=0)
    maml = algorithms.create("maml", model, engine=engine, precision="bf16")
    maml.evaluate(batch)  # its checks of the model are in float32
    with Products() as products:
        scores = maml.meta_backward(batch)
    assert products.types == {torch.bfloat16}
    assert scores.loss.dtype == torch.float32
    rounded = scores.loss.to(torch.bfloat16).to(torch.float32)
    assert not torch.equal(scores.loss, rounded)


def test_float32_is_so_within_an_autocast_of_the_users_own() -> None:
    plain = meta_gradient("batched", "float32")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(meta_gradient("batched", "float32"), plain)


def test_doubles_stay_doubles() -> None:
    with products_in("bf16", torch.device("cpu")):
        assert factor(torch.ones(2).double()).dtype == torch.float64
        assert unrounded(torch.ones(2).double()).dtype == torch.float64
        assert (torch.ones(2, 2).double() @ torch.ones(2, 2).double()).dtype == torch.float64
