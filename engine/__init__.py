"""The training engine: configuration, process groups, the loop, and checkpoints."""
