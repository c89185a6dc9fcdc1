"""Runs as worker processes on this machine."""
