"""LaTeX tables: booktabs, escaped text, floats that fit a page of `article`."""

import re
import shutil
import subprocess
from dataclasses import replace

import pytest
from stores import load_results, update_json, write_store

from distill_bench.report.results import COSTS
from distill_bench.report.tables.files import table_files
from distill_bench.report.tables.latex import COLUMNS, escape_latex
from distill_bench.report.tables.scores import row_heads, score_table


def bodies(latex):
    """Column formats and lines of the tabulars."""
    tabulars = re.findall(r"\\begin\{tabular\}\{(\w+)\}\n(.*?)\\end\{tabular\}", latex, re.DOTALL)
    return [(columns, body.splitlines()) for columns, body in tabulars]


def test_every_line_has_as_many_cells_as_the_table_has_columns(tabulated):
    for name in ("table.tex", "equal_cost.tex"):
        latex = (tabulated[0] / name).read_text()
        for columns, lines in bodies(latex):
            assert lines[0] == r"\toprule" and lines[-1] == r"\bottomrule"
            for line in lines:
                if line.endswith(r"\\"):
                    assert len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1, line
        assert r"K (fake-score\\updates)" in latex
        assert "% command: python -m distill_bench.report" in latex


def test_every_float_names_the_rows_and_holds_few_columns(tmp_path):
    runs = [(f"alpha{m}", s, c, 1.0 + s) for m in range(5) for c in range(5) for s in (0, 1)]
    store = write_store(tmp_path, runs)
    attempt = next(store.glob("alpha0-s1-*")) / "attempts" / "001"
    update_json(attempt / "start.json", code_fingerprint="c2")
    results = load_results(store, tmp_path / "data")
    latex = table_files(results)["table.tex"]
    tables = bodies(latex)
    # every column once, also those of a last float that is not full
    heads = score_table(results, results.headline + COSTS).heads
    assert sum(columns.count("r") for columns, _ in tables) == len(heads) - 2
    assert (len(heads) - 2) % COLUMNS
    assert len(tables) > 1 and latex.count(r"\begin{table}") == len(tables)
    assert all(re.fullmatch(f"ll(r{{1,{COLUMNS}}})", columns) for columns, _ in tables)
    assert latex.startswith("% needs \\usepackage{booktabs}\n") and "resizebox" not in latex
    hashes = [line for line in latex.splitlines() if "c2" in line]
    assert hashes and all(line.startswith("%") for line in hashes), "hashes are in comments only"


def test_floats_hold_the_lines_of_the_table_and_refer_to_the_first(tmp_path):
    """References stand above a rule; a line without any score of its float is left out."""
    rows = (("alpha", 1, 1.0), ("beta", 5, 5.0))
    runs = [(method, s, c, level + 0.01 * s) for method, c, level in rows for s in range(4)]
    results = load_results(write_store(tmp_path, runs), tmp_path / "data")
    results = replace(results, manifest=results.manifest | {"name": "speed, at_5%"})
    scores = score_table(results, results.headline + COSTS)
    names = len(row_heads(results))
    latex = table_files(results)["table.tex"]
    comments, *floats = latex.split("\\begin{table}\n")
    assert all(line.startswith("% ") for line in comments.splitlines())
    assert all(part.endswith("\\end{table}\n") for part in floats)
    first, *others = re.findall(r"\\caption\{(.*)\}\n\\label\{(.*)\}\n", latex)
    assert first[1] == "tab:speed-at-5-" and not others
    continued = [
        part.count("\\caption{Table~\\ref{tab:speed-at-5-}, continued.}\n") for part in floats
    ]
    assert continued == [0, *[1] * (len(floats) - 1)]
    assert "\\label{tab:speed-at-5--equal-cost}\n" in table_files(results)["equal_cost.tex"]
    for (_, body), start in zip(
        bodies(latex), range(names, len(scores.heads), COLUMNS), strict=True
    ):
        block = [*range(names), *range(start, min(start + COLUMNS, len(scores.heads)))]
        top, heads, *lines, bottom = body
        assert (top, bottom) == ("\\toprule", "\\bottomrule")
        words = [re.sub(r"\\shortstack\{(.*)\}", r"\1", text) for text in texts_of(heads)]
        assert [text.replace("\\\\", " ") for text in words] == [
            escape_latex(scores.heads[i]) for i in block
        ]
        for text, word in zip(texts_of(heads), words, strict=True):
            assert text.startswith("\\shortstack") == ("\\\\" in word)
        expected, above = ["\\midrule"], None
        for row, cells in scores.lines:
            shown = [plain(cells[i]) for i in block]
            if set(shown[names:]) != {"--"}:
                expected += ["\\midrule"] if above and not row.reference else []
                expected.append(" & ".join(shown) + r" \\")
                above = row.reference
        assert lines == expected and expected.count("\\midrule") in (1, 2)
    assert "\\textbf{" in latex and "\\,$\\pm$\\," in latex


def texts_of(line):
    return line.removesuffix(r" \\").split(" & ")


def plain(cell):
    """A cell without marks, as LaTeX."""
    assert not cell.marks
    text = r"\,$\pm$\,".join(map(escape_latex, cell.text.split(" ± ")))
    return rf"\textbf{{{text}}}" if cell.best else text


@pytest.mark.parametrize(
    "text, latex",
    [
        ("50% of a_b & #1 ± 2", r"50\% of a\_b \& \#1 $\pm$ 2"),
        ("one\n\ntwo", "one two"),  # \caption holds one paragraph
        ("σ ≤ 0.5, Ω, ο", r"$\sigma$ $\leq$ 0.5, $\Omega$, o"),
        (r"{\x}", r"\{\textbackslash{}x\}"),
        ("naïve “é”", "naïve “é”"),
        ("猫 😀 한", "? ? ?"),
        ("[0, 1] *", "{}[0, 1] *"),  # after a line break, brackets and stars are its options
        ("ε = ∇L, ά, 𝜎, x\u0302, e\u0301", r"$\epsilon$ = $\nabla$L, $\alpha$, $\sigma$, x, é"),
        ("ﬁt ⅕ ℃ ≠ ≢", r"fit 1/5 $^\circ$C $\neq$ ?"),
        ("* Ⅹ ≮ ∉", "{}* X ? ?"),  # struck out symbols mean the opposite
    ],
)
def test_plain_text_is_escaped(text, latex):
    assert escape_latex(text) == latex


def test_characters_that_pdflatex_cannot_set_are_replaced():
    assert escape_latex("ą Ę ａ ① ĸ þ ƀ 漢 🐈 \x00 \x9f \u200b") == "a E a 1 ? ? ? ? ? ? ? ?"


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_every_character_compiles(tmp_path):
    text = " ".join(map(chr, [*range(0x20, 0x3000), *range(0xFB00, 0xFB07), 0x6F22, 0x1F408]))
    head, end = "\\documentclass{article}\n\\begin{document}\n", "\n\\end{document}\n"
    (tmp_path / "t.tex").write_text(head + escape_latex(text) + end, encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-500:]


def test_a_question_of_two_paragraphs_is_one_caption(tmp_path):
    question = "Does γ help?\n\nAnd at σ = 0.5 & below?"
    store = write_store(tmp_path, [("alpha", 0, 1, 1.0)], question=question)
    latex = table_files(load_results(store, tmp_path / "data"))["table.tex"]
    assert r"\caption{Does $\gamma$ help? And at $\sigma$ = 0.5 \& below? Mean" in latex
    assert "\n\n" not in latex
    depth = latex.replace(r"\{", "").replace(r"\}", "")
    assert depth.count("{") == depth.count("}")


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no pdflatex")
def test_the_tables_compile_and_fit_the_text(tabulated, tmp_path):
    for name in ("table.tex", "equal_cost.tex"):
        shutil.copy(tabulated[0] / name, tmp_path)
    paper = r"\documentclass{article}\usepackage{booktabs}\begin{document}"
    (tmp_path / "paper.tex").write_text(paper + r"\input{table}\input{equal_cost}\end{document}")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:]
    assert "Overfull" not in run.stdout
