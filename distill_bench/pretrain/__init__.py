"""Trains the networks that ship with the package: mini-wan and the evaluators' networks."""
