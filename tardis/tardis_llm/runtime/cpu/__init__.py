"""CPU kernels in C++, and how to call them."""
