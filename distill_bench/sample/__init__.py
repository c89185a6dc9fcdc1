"""Samples the clips of students and reference rows, and reads and writes folders of clips."""
