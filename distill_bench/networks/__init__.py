"""Networks as denoisers, and how a run holds them: precision, adapters, sharding, offload."""
