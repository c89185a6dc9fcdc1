"""Figures of results/<name>: one module per kind of figure, all drawn from the data files only."""
