"""A plug-in that makes MAML's meta-steps a quarter slower: a regression planted on purpose."""

import functools
import time

import algorithms

SHARE = 0.25
MAML = algorithms.get("maml")
meta_backward = MAML.meta_backward


@functools.wraps(meta_backward)
def slowed(self, batch):
    """The meta-gradient, and then idle work for a quarter of the CPU time that it took."""
    began = time.process_time()
    scores = meta_backward(self, batch)
    end = began + (1 + SHARE) * (time.process_time() - began)
    while time.process_time() < end:
        pass
    return scores


MAML.meta_backward = slowed
