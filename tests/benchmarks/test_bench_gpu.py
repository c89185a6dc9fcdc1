"""The GPU benchmark runs on a CPU at a tiny size and writes its whole table."""

import gpu
import pytest


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


def test_without_a_gpu_the_benchmark_ends_with_a_message(capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit) as ended:
        gpu.main([])
    assert ended.value.code == 2 and "no GPU here" in capsys.readouterr().err
