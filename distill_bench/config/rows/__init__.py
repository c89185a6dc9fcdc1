"""Rows of a sweep that train nothing: other ways to sample a network."""
