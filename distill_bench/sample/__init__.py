"""Clips of students and reference rows."""
