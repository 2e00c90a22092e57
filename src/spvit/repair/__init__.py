"""Route B, without training: fit what pruning changed, score what may change, choose within a budget."""
