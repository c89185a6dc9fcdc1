"""A rollout's graph is shared by both losses only where the method says that its losses can."""

import pytest

from distill_bench.config.errors import ConfigError
from distill_bench.config.resolve import resolve
from distill_bench.registry import methods


@pytest.mark.parametrize("name", sorted(set(methods()) - {"sgmd", "consistency"}))
def test_methods_with_a_fake_score_other_than_sgmd_share_no_graph(name):
    with pytest.raises(ConfigError, match="needs a separate forward pass"):
        resolve({"method": {"name": name}, "reuse_rollout": "graph"})
