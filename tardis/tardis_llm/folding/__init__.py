"""The mathematics of folding: pure functions, tensors in, tensors out."""
