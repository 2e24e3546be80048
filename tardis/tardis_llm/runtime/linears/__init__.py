"""Linear layers around the FFNs: dense ones through the kernels, and ones that are stored in few bits."""
