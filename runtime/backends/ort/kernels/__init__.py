"""Kernels of our own for ONNX Runtime on the CPU: a C++ library that is built where it is wanted
(``lvlm-build cpu``). Without it the ops' functions of standard operators run."""
