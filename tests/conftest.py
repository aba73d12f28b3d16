"""What all tests share."""

import os

# The tensors here are tiny, and the tests run on every core at once: a second thread costs more in
# waiting than it saves in work, here and in the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)
