"""What an FFN is, dense and folded: weights, mathematics, activations, bytes. Tensors only: no models, no files."""
