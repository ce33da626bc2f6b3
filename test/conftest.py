"""Without a GPU Triton kernels run interpreted. Triton reads the choice when it is first imported.

Tensors are small then, and threads that share them would wait for each other more than they compute.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
