"""Tables of a study, and their files."""
