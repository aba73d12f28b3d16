"""TorchOpt's differentiable SGD, one task after another: its functional interface.

Its ``MetaSGD`` over modules does the same, but would adapt every parameter of the module.
"""

from __future__ import annotations

from collections.abc import Callable

import torchopt
from torch import Tensor

from tests.performance.peers.autograd_loop import Parameters, Update, meta_step
from tests.performance.peers.work import Work


def prepare(work: Work) -> Callable[[], dict[str, Tensor]]:
    """The meta-step of some work."""
    sgd = torchopt.sgd(lr=work.setting.lr)

    def start(adapted: Parameters) -> Update:
        state = sgd.init(adapted)

        def descend(before: Parameters, gradients: Parameters) -> Parameters:
            nonlocal state
            updates, state = sgd.update(gradients, state, params=before, inplace=False)
            return torchopt.apply_updates(before, updates, inplace=False)

        return descend

    return meta_step(work, start)
