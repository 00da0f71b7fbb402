"""`alexnet_head` on one CUDA device, for brute force and the direct path.

python -m benchmarks.alexnet_head_gpu
"""

import sys

import torch

from benchmarks.alexnet_head import main

if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA device; run `make bench` for the CPU")
    main("cuda", "alexnet_head_gpu")
