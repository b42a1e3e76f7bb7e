"""Jobs of training on a SLURM cluster of two nodes that the tests start on this machine."""
