"""ANIL: Raghu, Raghu, Bengio and Vinyals 2020, Rapid Learning or Feature Reuse?
(arXiv 1909.09157)."""

from __future__ import annotations

from algorithms.base import head_names, register
from algorithms.maml import MAML


@register("anil")
class ANIL(MAML):
    """MAML whose inner loop changes the head alone (section 4.1).

    All parameters are meta-learned, through the inner steps: the body's gradient comes by the
    features of the query set and by those of the support set that the head adapted to.
    """

    summary = "MAML that adapts the head alone (Raghu et al. 2020)"

    def adapted(self) -> list[str]:
        head = head_names(self.model)
        return [name for name in super().adapted() if name in head]
