"""The page: it stands alone, works in a browser, and claims no more than the intervals."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from stores import PROMPTS, RUNS, write_clips, write_lines, write_store

from distill_bench.report.data_files import data_files
from distill_bench.report.page.html import render_page
from distill_bench.report.page.sentences import findings
from distill_bench.report.page.wall import Wall, wall
from distill_bench.report.read_store import read_sweep
from distill_bench.report.results import Results, load
from distill_bench.report.tables.scores import score_table

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
needs_browser = pytest.mark.skipif(not BROWSER, reason="no Chromium")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_store(tmp_path, RUNS)


def results_of(store: Path, folder: Path) -> Results:
    """Write the data files of the sweep and load them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in data_files(read_sweep("speed", store)).items():
        (folder / name).write_text(text)
    return load(folder)


def wall_of(store: Path, folder: Path) -> Wall:
    stored = {run.run_id: run for run in read_sweep("speed", store).everything}
    return wall(results_of(store, folder), stored)


# --- text ---


def test_warnings_are_footnotes(tmp_path):
    store = write_store(tmp_path, [("alpha", 0, 1, 1.0), ("beta", 0, 1, 2.0)])
    path = next(store.glob("beta-*")) / "metrics.jsonl"
    first, *rest = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, [first | {"warnings": ["too few clips to trust"]}, *rest])
    results = results_of(store, tmp_path / "data")
    page = render_page(results, read_sweep("speed", store), tmp_path / "data")
    assert page.count("<sup>1</sup>") == 2, "at the cell and below the table"
    assert "too few clips to trust" in page


def test_the_page_stands_alone(reported):
    folder, store = reported
    text = (folder / "report.html").read_text()
    assert "Does a faster fake_score pay?" in text
    links = re.findall(r"(?:src|href)=\"([^\"]*)\"", text)
    assert [link for link in links if not link.startswith(("data:", "#"))] == []
    assert "@import" not in text
    assert "http" not in re.sub(r"data:[^\"]*|http://www.w3.org/[\w/]*", "", text)
    assert "a blue square moves up &amp; 10% right" in text and "out of &lt;luck&gt;" in text
    assert "1/4 (1 collapsed, 1 failed, 1 missing)" in text
    assert all(run.name in text for run in store.glob("*-s*-*"))
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))


def test_the_findings_claim_no_more_than_the_intervals(results):
    first, *_, last = findings(results)
    assert first.startswith(
        "Lowest in Distance: Beta, K=1 with 4.00, not clearly ahead of every other row."
    )
    assert "0 of 2 rows clearly better and 1 clearly worse than the baseline Alpha, K=1" in first
    assert last == (
        "Rows that do not have all their runs: Beta, K=1 1/4 (1 collapsed, 1 failed, 1 missing)."
    )


@pytest.fixture
def results(store: Path, tmp_path: Path) -> Results:
    return results_of(store, tmp_path / "data")


def test_no_row_wins_if_a_rival_lost_its_runs(tmp_path):
    """A row is not ahead of rows that may have been better."""
    values = {"alpha": 1.0, "beta": 5.0}
    runs = [
        (method, seed, 1, value * (1 + seed / 100))
        for method, value in values.items()
        for seed in range(4)
    ]
    lost_run = ("gamma", 0, 1, None, None)
    won = results_of(write_store(tmp_path / "whole", runs), tmp_path / "a")
    lost = results_of(write_store(tmp_path / "lost", [*runs, lost_run]), tmp_path / "b")
    assert "clearly ahead" in findings(won)[0] and "not clearly" not in findings(won)[0]
    assert "not clearly ahead" in findings(lost)[0]
    assert any(cell.best for _, cells in score_table(won, won.headline).lines for cell in cells)
    assert not any(
        cell.best for _, cells in score_table(lost, lost.headline).lines for cell in cells
    )


# --- clips ---


def test_the_wall_leaves_out_references_of_other_seeds(store, tmp_path):
    write_clips(store / "references" / "data", 90, first_seed=100)
    shown = wall_of(store, tmp_path / "data")
    assert [label for label, _ in shown.tiles] == [
        "teacher",
        "Alpha, K=1",
        "Alpha, K=5",
        "Beta, K=1",
    ]
    assert [prompt for prompt, _ in shown.prompts] == PROMPTS and shown.frames == 4
    assert {len(clips) for _, clips in shown.tiles} == {3}


def test_the_wall_shows_every_row_on_four_prompts(tmp_path):
    cadences = range(1, 6)
    runs = [(m, s, c, 1.0 + c) for m in ("alpha", "beta") for c in cadences for s in (0, 1)]
    store = write_store(tmp_path, runs)
    prompts = [f"prompt {i // 2}" for i in range(12)]  # two sampling seeds per prompt
    for clips in store.rglob("clips.npy"):
        np.save(clips, np.full((12, 4, 3, 8, 8), 90, np.uint8))
        lines = [{"prompt": prompt, "seed": i} for i, prompt in enumerate(prompts)]
        write_lines(clips.with_name("manifest.jsonl"), lines)
    shown = wall_of(store, tmp_path / "data")
    assert len(shown.tiles) == 12, "ten rows and two references"
    assert len({prompt for prompt, _ in shown.prompts}) == len(shown.prompts) == 4


def test_prompts_go_from_the_most_to_the_least_motion(store, tmp_path):
    frames = np.full((3, 4, 3, 8, 8), 100, np.uint8)
    for clip, step in enumerate((0, 5, 2)):
        frames[clip] += (step * np.arange(4, dtype=np.uint8))[:, None, None, None]
    np.save(store / "references" / "teacher" / "clips.npy", frames)
    prompts = [prompt for prompt, _ in wall_of(store, tmp_path / "data").prompts]
    assert prompts == [PROMPTS[1], PROMPTS[2], PROMPTS[0]]


def test_a_clip_is_in_the_page_once(reported):
    text = (reported[0] / "report.html").read_text()
    shown = re.findall(r'<img src="(data:[^"]*)"', text)
    others = json.loads(re.search(r'id="tiles">(.*?)</script>', text, re.DOTALL)[1])
    assert len(shown) == len(others) == 5 and {len(clips) for clips in others} == {2}


# --- in a browser ---

# Use every control, then write into the title how wide the page is and what the controls did.
USE = """<script>
const all = selector => [...document.querySelectorAll(selector)];
const last = select => { select.value = select.options[select.options.length - 1].value; };
all("thead button").forEach(button => { button.click(); button.click(); });
all("select").forEach(select => { last(select); select.onchange(); });
all("details").forEach(details => details.open = true);
document.getElementById("play").click();
const tables = all(".family:not([hidden])").length;
const clips = new Set(all(".clip img").map(image => image.src)).size;
const label = document.getElementById("play").textContent;
const widths = [innerWidth, document.documentElement.scrollWidth];
const scrolled = all(".scroll").filter(table => table.scrollWidth > table.clientWidth).length;
document.title = ["USED", ...widths, tables, label, clips, scrolled].join(" ");
</script>"""


def title_of(page: Path, profile: Path, width: int = 1280) -> str:
    """Open a page in Chromium and return its title; fail on any message of the console."""
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
    options += ["--virtual-time-budget=2000", "--enable-logging=stderr"]
    options += [f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    done = subprocess.run([BROWSER, *options], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    return re.search(r"<title>(.*?)</title>", done.stdout)[1]


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("width", [500, 1280])  # without a screen no window is narrower
def test_every_control_of_the_page_works(reported, tmp_path, width):
    page = tmp_path / "page.html"
    page.write_text((reported[0] / "report.html").read_text().replace("</body>", f"{USE}</body>"))
    title = title_of(page, tmp_path / "profile", width)
    used, inner, scroll, tables, label, clips, _ = title.split()
    assert used == "USED"
    assert int(scroll) <= int(inner) == width, "the page scrolls sideways"
    assert (tables, label) == ("1", "Play"), "one score's differences, a paused wall"
    assert int(clips) > 1


@pytest.mark.slow
@needs_browser
def test_neither_page_nor_tables_scroll_sideways_on_a_phone(reported, tmp_path):
    """In a frame as wide as a phone. A prompt of a real model is a sentence or two."""
    page = (reported[0] / "report.html").read_text()
    page = page.replace(PROMPTS[0], 12 * "a long prompt of many words ")
    text = json.dumps(page.replace("</body>", f"{USE}</body>")).replace("</", "<\\/")
    (tmp_path / "frame.html").write_text(f"""<body><script>
    const frame = document.createElement("iframe");
    frame.width = 390; frame.style.border = 0; frame.srcdoc = {text};
    document.body.append(frame);
    frame.onload = () => document.title = frame.contentDocument.title;
    </script>""")
    _, inner, scroll, _, _, _, scrolled = title_of(
        tmp_path / "frame.html", tmp_path / "profile"
    ).split()
    assert int(inner) == 390 and int(scroll) <= 390
    assert scrolled == "0", "a table scrolls"
