"""Everything that knows SLURM: what is queued for a run, in which scripts, and how it stands."""
