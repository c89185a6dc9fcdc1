"""The GPU benchmark runs whole on a processor, at a tiny size; a part that fails loses no other."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import bench_gpu
import gpu_rows
import gpu_scores
import gpu_updates
import pytest
import torch


def lines_of(command: str, seconds: float = 60) -> tuple[list[str], str | None]:
    return bench_gpu.run_part([sys.executable, "-c", command], os.environ, seconds, print)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_part_runs_to_its_end_on_a_processor(tmp_path, capfd):
    out = tmp_path / "bench.md"
    code = bench_gpu.main(["--device=cpu", "--size=tiny", "--minutes=60", f"--out={out}"])
    assert code == 0, capfd.readouterr().err
    sections = {
        section.splitlines()[0]: [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in section.splitlines()
            if line.startswith("|")
        ]
        for section in out.read_text(encoding="utf-8").split("## ")[1:]
    }
    table = [line for line in out.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert "\n".join(table[:4]) in out.read_text(encoding="utf-8")  # no other line between
    resumed, throughput, scores, updates = (
        sections[part.title] for part in bench_gpu.PARTS.values()
    )
    for name, tensors, repeated, again in resumed[2:]:
        assert int(tensors) > 50 and (repeated, again) == ("0", "0"), name
    assert [row[1] for row in throughput[2:]] == ["fvd", "clip_score", "motion"]
    assert all(float(row[2]) > 0 for row in throughput[2:])
    assert scores[2:] == [["dino_similarity", "cpu", "0", "0"]]
    assert tuple(updates[0]) == gpu_updates.HEADINGS
    expected = {(method, row) for method in gpu_updates.METHODS for row in gpu_updates.FULL_ROWS}
    expected |= {("dmd2", f"1 blocks: {row}") for row in gpu_updates.FEW_ROWS}
    assert {tuple(row[:2]) for row in updates[2:]} == expected
    for _, setting, student, fake_score, over, _, _, predicted in updates[2:]:
        assert float(student) > 0 and float(fake_score) > 0 and float(predicted) > 0
        assert over.endswith("%") or setting == "1 blocks: shared base by adapters"


def test_a_failing_row_leaves_the_others(capsys):
    def fail():
        raise RuntimeError("no kernel | here\nmore")

    assert gpu_rows.show_row(["a", "b"], 4, lambda: ["1", "2"])
    assert not gpu_rows.show_row(["c", "d"], 4, fail)
    assert gpu_rows.show_row(["e"], 4, None)
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "| a | b | 1 | 2 |",
        "| c | d | failed: no kernel / here | - |",
        "| e | no time was left | - | - |",
    ]
    assert "RuntimeError: no kernel" in printed.err


def test_no_row_begins_that_would_not_end_in_time(monkeypatch, capsys):
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(gpu_updates.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(gpu_updates, "row", lambda *_: ("1",))
    monkeypatch.setattr(gpu_updates, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(gpu_updates, "predicted_gib", lambda *_: 1.0)
    assert gpu_updates.main(["--device=cpu", "--size=tiny", "--seconds=45"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" | 1 |")]
    assert rows == ["| dmd2 | reference | 1 |", "| sgmd | reference | 1 |"]


def test_a_rehearsal_overwrites_no_table(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench_gpu, "ROOT", tmp_path)
    monkeypatch.setattr(bench_gpu, "run_part", lambda *_: (["| a |"], None))
    assert bench_gpu.main(["--device=cpu", "--size=tiny"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert "not written" in capsys.readouterr().out


def test_a_part_that_fails_or_hangs_leaves_the_lines_that_it_printed():
    assert lines_of("print('a'); print('b')") == (["a", "b"], None)
    lines, reason = lines_of("print('a'); raise SystemExit(3)")
    assert lines == ["a"] and "code 3" in reason
    child = "import subprocess; subprocess.run(['sleep', '60'])"  # holds the pipe
    lines, reason = lines_of(f"print('a', flush=True); {child}", seconds=1)
    assert lines == ["a"] and reason == "Stopped after 1 s."


def test_without_a_gpu_the_benchmark_ends_with_a_message(capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit) as ended:
        bench_gpu.main([])
    assert ended.value.code == 2 and "no GPU here" in capsys.readouterr().err


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
