"""Predicted cost and memory of a sweep, before anything runs."""
