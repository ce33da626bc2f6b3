"""Without a GPU Triton kernels run interpreted. Triton reads the choice when it is first imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
