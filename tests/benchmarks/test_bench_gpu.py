"""The GPU benchmarks run on a CPU, updates at a tiny size, and give their whole tables."""

import gpu
import gpu_scores
import pytest
import torch


@pytest.mark.slow
def test_the_benchmark_ends_with_its_table(tmp_path, capsys):
    out = tmp_path / "bench.md"
    skipped = [  # each takes seconds
        "compiled blocks",
        "no checkpointing",
        "batched guidance",
        "float32 weights under autocast",
    ]
    arguments = ["--device=cpu", "--size=tiny", "--rounds=1", "--peak-tflops=0.0001"]
    arguments += [f"--out={out}", *(f"--skip={row}" for row in skipped)]
    assert gpu.main(arguments) == 0
    lines = [
        line.strip("| ").split(" | ")
        for line in out.read_text().splitlines()
        if line.startswith("|")
    ]
    assert tuple(lines[0]) == gpu.HEADINGS
    rows = {
        (cells[0], cells[1]): dict(zip(gpu.HEADINGS, cells, strict=True)) for cells in lines[2:]
    }
    assert rows.keys() == {
        (method, row) for method in gpu.METHODS for row in gpu.ROWS if row not in skipped
    }
    for cells in rows.values():
        assert float(cells["student update, s"]) > 0 and float(cells["MFU"].rstrip("%")) > 0
        assert float(cells["predicted, GiB"]) > 0


@pytest.mark.parametrize("benchmark", [gpu, gpu_scores])
def test_without_a_gpu_the_benchmark_ends_with_a_message(benchmark, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit) as ended:
        benchmark.main([])
    assert ended.value.code == 2 and "no GPU here" in capsys.readouterr().err


@pytest.mark.slow
def test_scores_of_a_device_are_compared_with_the_processors(capsys):
    assert gpu_scores.main(["--device=cpu", "--cases", "dino_similarity"]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    assert line == "| dino_similarity | cpu | 0 | 0 |"


def test_differences_are_shares_of_the_tolerances():
    """Features 2e-4 of their norm apart; a score by 0.3 %, and one near 0 by half of 1e-4."""
    rows = {"own a": torch.ones(3, 4), "teacher b": torch.ones(2, 4)}
    moved = rows | {"teacher b": rows["teacher b"] * (1 + 2e-4)}
    one = gpu_scores.Scored({"fvd": 2.0, "kvd": 0.0}, rows, frozenset())
    other = gpu_scores.Scored({"fvd": 2.006, "kvd": 5e-5}, moved, frozenset())
    assert gpu_scores.differences(one, other) == pytest.approx((2, 3), rel=1e-2)
    flow = {"motion": 1.0}
    one, other = (gpu_scores.Scored(flow, x, frozenset()) for x in (rows, moved))
    assert gpu_scores.differences(one, other) == pytest.approx((0.2, 0), rel=1e-2)
