"""Networks as denoisers of a role: loading, precision, adapters, sharding, offload, cost ledger.

README.md in this folder covers running at size: memory, several GPUs, LoRA, bfloat16, exports.
"""
