"""Where a model's attention layers and FFNs are, the weights there, and how images pass."""
