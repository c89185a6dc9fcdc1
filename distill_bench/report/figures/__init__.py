"""Figures of results/<name>: one module per family, all drawn from the data files alone."""
