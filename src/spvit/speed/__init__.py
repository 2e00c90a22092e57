"""How fast models are: measured in turns, and as a budget to decide by."""
