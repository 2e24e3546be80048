"""The GPU backend: folded FFNs and layers in few bits by Triton kernels, for NVIDIA and AMD."""
