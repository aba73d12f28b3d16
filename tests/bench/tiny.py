"""A plug-in with a dataset small enough to train on in a second, noisy copies of 6x6 patterns, and
algorithms that go wrong."""

import os
import signal
import time
from dataclasses import replace

import torch

import algorithms
import datasets


@datasets.register("tiny")
class Tiny(datasets.Dataset):
    summary = "noisy patterns, for tests"

    def load(self, split: str) -> datasets.ClassSource:
        seed = self.splits.index(split)
        generator = torch.Generator().manual_seed(seed)
        patterns = torch.rand(12, 1, 1, 6, 6, generator=generator)
        noise = torch.rand(12, 20, 1, 6, 6, generator=generator)
        samples = (255 * (0.7 * patterns + 0.3 * noise)).to(torch.uint8).flatten(0, 1)
        return datasets.ClassSource(samples, [20] * 12, [f"{split}{i}" for i in range(12)])


@algorithms.register("diverging")
class Diverging(algorithms.get("maml")):
    summary = "MAML whose loss is no number"

    def meta_gradient(self, tasks):
        outputs, gradients = super().meta_gradient(tasks)
        return outputs * float("nan"), gradients


class HalfWay(algorithms.get("maml")):
    """Goes wrong in the midst of a training, and nowhere else, until it is mended."""

    def meta_gradient(self, tasks):
        if 0.4 < self.progress < 1.0 and self.name != os.environ.get("MENDED"):
            self.go_wrong()
        return super().meta_gradient(tasks)


@algorithms.register("raising")
class Raising(HalfWay):
    summary = "MAML that raises"

    def go_wrong(self):
        raise KeyError("no such key")


@algorithms.register("leaving")
class Leaving(HalfWay):
    summary = "MAML that would end the program"

    def go_wrong(self):
        raise SystemExit(3)


@algorithms.register("greedy")
class Greedy(HalfWay):
    summary = "MAML that asks torch for more memory than there is"

    def go_wrong(self):
        torch.empty(1 << 50, dtype=torch.uint8)


@algorithms.register("dying")
class Dying(HalfWay):
    summary = "MAML whose process is killed, as by a system that is out of memory"

    def go_wrong(self):
        os.kill(os.getpid(), signal.SIGKILL)


@algorithms.register("hanging")
class Hanging(HalfWay):
    summary = "MAML that hangs"

    def go_wrong(self):
        time.sleep(3600)


@algorithms.register("hazy")
class Hazy(algorithms.get("maml")):
    summary = "MAML whose test scores are no numbers"

    def load_state_dict(self, state):  # of the parameters that are kept, to be tested
        super().load_state_dict(state)
        self.trained = True

    def evaluate(self, batch, steps):
        scores = super().evaluate(batch, steps)
        haze = float("nan") if getattr(self, "trained", False) else 1.0
        return replace(scores, loss=scores.loss * haze)


@algorithms.register("dawdling")
class Dawdling(algorithms.get("maml")):
    summary = "MAML that takes its time, enough to be interrupted"

    def meta_gradient(self, tasks):
        if self.progress < 1.0 and self.name != os.environ.get("MENDED"):
            time.sleep(0.05)
        return super().meta_gradient(tasks)
