"""Text generation from the weights in training."""
