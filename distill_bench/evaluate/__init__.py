"""Scores of clips, and the networks that extract features."""
