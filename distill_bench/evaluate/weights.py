"""TODO: evaluate.weights."""

import importlib.util
from functools import cache
from pathlib import Path


def weights_file(path: str, name: str, what: str) -> Path:
    if not path:
        raise ValueError(f"{name} needs {what} by path: {name}:/path")
    if not Path(path).is_file():
        raise ValueError(f"no weights at {path}: {name} needs {what}")
    return Path(path)


@cache
def load_module(path: Path):
    spec = importlib.util.spec_from_file_location(
        f"distill_bench_extractor_{path.stem}", path.resolve()
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
