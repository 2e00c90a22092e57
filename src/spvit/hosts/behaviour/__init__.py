"""Finds the layers of a model by what they do when it runs: recognition of any vision transformer."""
