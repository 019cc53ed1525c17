"""Proof and speed of the CUDA kernels on a GPU: `python -m gpuxbar.bench.gpu`."""
