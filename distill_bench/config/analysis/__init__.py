"""Analysis that a sweep file declares before its runs; no run id depends on it."""
