"""Route A, as published: gates on the replacements learn with the weights, in a single path."""
