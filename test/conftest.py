"""Without a GPU Triton kernels run interpreted. Triton reads the choice when it is first imported.

Tensors are small then, and threads that share them would wait for each other more than they compute.

Each of several workers has a folder of its own for temporary files, so that a test can say what an engine leaves there.
"""

import atexit
import os
import shutil
import tempfile

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    tempfile.tempdir = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="test-")
    atexit.register(shutil.rmtree, tempfile.tempdir, ignore_errors=True)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
