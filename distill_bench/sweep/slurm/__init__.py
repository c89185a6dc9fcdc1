"""Runs as SLURM jobs: submission, the part on the node, the queue."""
