"""Run folders on disk: atomic files, claims, run states, stop requests. Imports no torch."""
