"""Scores a folder of clips: the command, feature extractors, distances and optical flow."""
