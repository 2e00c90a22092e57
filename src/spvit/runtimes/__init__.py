"""Out of PyTorch: programs for other runtimes, run and compared, and the same in eight bits."""
