"""`compile`: blocks or whole networks through torch.compile."""

import pytest
from network_variants import ON_FEATURES, largest_difference

from distill_bench.train.loop import train

SHORT = {"student_updates": 1, "fake_score_updates": 1}


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [True, "network"])
def test_compiled_networks_only_change_rounding(compiled, make_run, tmp_path, monkeypatch):
    """One method is enough: all roles share what is compiled. This one stops a forward half-way."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    common = {"method": ON_FEATURES} | SHORT
    plain = make_run("plain", **common)
    other = make_run("compiled", compile=compiled, **common)
    assert train(plain)["cost"] == train(other)["cost"]
    assert 0 < largest_difference(plain, other) < 1e-5
