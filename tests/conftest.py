"""What all tests share."""

import torch

# The tensors here are tiny: a second thread costs more in waiting than it saves in work.
torch.set_num_threads(1)
