"""Linear layers around the FFNs: dense ones through our kernels, and ones that are stored in few bits."""
