"""Figures of results/<name>: one module per kind of figure, all drawn from the data files only."""

import logging

# Without a writable home, matplotlib keeps its font cache in a temporary folder, and warns of it.
logging.getLogger("matplotlib").addFilter(
    lambda record: record.funcName != "_get_config_or_cache_dir"
)
