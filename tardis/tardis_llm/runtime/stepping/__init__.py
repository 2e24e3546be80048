"""Decoding steps of whole models by the kernels: what happens between the products, too, without Python or torch."""
