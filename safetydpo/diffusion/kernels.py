"""Which of a GPU's kernels a model runs on, where torch's own choice is fast but wrong. On a CPU it means nothing."""

from __future__ import annotations

import torch
import torch.compiler.config


def choose_kernels() -> None:
    """Ask a GPU for float32 that is float32, convolutions that repeat their bits, and attention with a right gradient.

    cuDNN's own choice is TF32, with 10 bits of mantissa, and gradients that differ from run to run. Its attention,
    which torch prefers on an H100 or H200, has a wrong backward pass in 16 bits for some lengths: on a FLUX network of
    true head size the gradient was 500 times too long or not finite, with the loss as it should be, where torch's other
    kernels agree with each other (`tests/cuda`; pytorch/pytorch issue 196678).
    """
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Compiled code that torch keeps on disk has the kernel of attention in it, and its key does not say which.
    torch.compiler.config.cache_key_tag = "safetydpo: no attention by cuDNN"
