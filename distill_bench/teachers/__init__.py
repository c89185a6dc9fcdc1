"""Teacher names, folders, content hashes and prompts. Loads no weights."""
