"""The built-in job: generated arithmetic problems and a small model with random weights."""
