"""Expand, launch and watch the runs of a sweep, locally or on SLURM."""
