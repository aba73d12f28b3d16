"""What all tests share."""

import os

# The tensors here are tiny, and the tests run on every core at once: a second thread costs more in
# waiting than it saves in work, here and in the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from hypothesis import settings

# Property tests say nothing of how many examples they try; make properties tries many.
settings.register_profile("short", max_examples=20)
settings.register_profile("long", max_examples=1000)
settings.load_profile(os.environ.get("BENCH_PROPERTIES", "short"))

torch.set_num_threads(1)
