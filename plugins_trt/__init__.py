"""CUDA kernels of the ``lvlm`` ops and the TensorRT plugins and engines made of them."""
