"""Train the networks shipped with the package: mini-wan and the evaluators' networks."""
