"""Training: the losses, the data and the one loop."""
