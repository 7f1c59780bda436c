"""Tasks, metrics, and the comparison of a float model with its quantized version."""
