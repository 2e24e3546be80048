"""What `train_sample.py` is made of, from the recipe to the saved model."""
