"""YAML to validated, frozen configs, and the ids of runs."""
