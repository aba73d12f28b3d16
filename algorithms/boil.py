"""BOIL: Oh, Yoo, Kim and Yun 2021, BOIL: Towards Representation Change for Few-shot Learning
(arXiv 2008.08882)."""

from __future__ import annotations

from algorithms.base import AlgorithmError, head_names, register
from algorithms.maml import MAML


@register("boil")
class BOIL(MAML):
    """MAML whose inner loop changes all but the head: the mirror of ANIL (section 3).

    All parameters are meta-learned, through the inner steps. The head is the same in every task, so
    that tasks can only be told apart by features that change.
    """

    summary = "MAML that adapts all but the head (Oh et al. 2021)"

    def adapted(self) -> list[str]:
        head = head_names(self.model)
        body = [name for name in super().adapted() if name not in head]
        if not body:
            raise AlgorithmError("boil adapts what is before the head; the model has nothing there")
        return body
