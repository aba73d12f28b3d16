"""A plug-in with a dataset small enough to train on in a second: noisy copies of 6x6 patterns."""

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
