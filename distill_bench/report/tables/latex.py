"""LaTeX tables with booktabs, one float per block of columns."""

import re
import unicodedata
from collections.abc import Sequence

from distill_bench.report.results import Results
from distill_bench.report.tables.contrasts import (
    Estimate,
    contrast_heads,
    contrast_lines,
    contrasts_caption,
)
from distill_bench.report.tables.scores import Cell, Table, footnotes_of, row_heads

COLUMNS = 3  # score columns per float, which fit the text width of `article`
HINTS = (
    r"needs \usepackage{booktabs}",
    r"each float fits the text width of article; on a wider page join the tabulars",
)
HEAD_LETTERS = 13  # per line of a column's head

SYMBOLS = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "—": "--",
    "−": "$-$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "≈": r"$\approx$",
    "≠": r"$\neq$",
    "∼": r"$\sim$",
    "∝": r"$\propto$",
    "∈": r"$\in$",
    "∂": r"$\partial$",
    "∇": r"$\nabla$",
    "√": r"$\surd$",
    "∑": r"$\sum$",
    "‖": r"$\|$",
    "∞": r"$\infty$",
    "←": r"$\leftarrow$",
    "↔": r"$\leftrightarrow$",
    "⇒": r"$\Rightarrow$",
    "⁄": "/",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "→": r"$\rightarrow$",
    "²": "$^2$",
    "³": "$^3$",
    "°": r"$^\circ$",
    "µ": r"$\mu$",
    "«": r"$\ll$",
    "»": r"$\gg$",
    "\xa0": "~",
    "\xad": r"\-",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
} | {symbol: "\\" + symbol for symbol in "&%$#_{}"}
# Letters of Latin-1 and Latin Extended-A that pdflatex's default fonts lack, found by compiling all
BEYOND_OT1 = set("ÐðĐđŊŋÞþĄąĘęĮįŲųĦħĸĿŀŉŦŧſ")
# In the order of Unicode; LaTeX has no macro for letters that look like Latin ones.
SMALL_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi o pi rho varsigma "
    "sigma tau upsilon phi chi psi omega"
)
CAPITAL_GREEK = (
    "A B Gamma Delta E Z H Theta I K Lambda M N Xi O Pi P ? Sigma T Upsilon Phi X Psi Omega"
)
for first, names in (("α", SMALL_GREEK), ("Α", CAPITAL_GREEK)):
    for offset, name in enumerate(names.split()):
        SYMBOLS[chr(ord(first) + offset)] = f"$\\{name}$" if len(name) > 1 else name


def latex_table(results: Results, table: Table, label: str, caption: str) -> str:
    """Format a table as LaTeX floats, at most COLUMNS scores in each.

    Args:
        label: suffix of `tab:<sweep's name>`, the label of the first float.
        caption: plain text; it follows the sweep's question.
    """
    reference = "tab:" + re.sub("[^A-Za-z0-9]+", "-", results.name) + label
    notes = [f"{number}: {text}." for number, text in footnotes_of(results, table)]
    text = " ".join([results.question, caption, *notes])
    captions = [f"\\caption{{{escape_latex(text)}}}\n\\label{{{reference}}}"]
    names = len(row_heads(results))
    floats = []
    for start in range(names, len(table.heads), COLUMNS):
        block = [*range(names), *range(start, min(start + COLUMNS, len(table.heads)))]
        captions.append(rf"\caption{{Table~\ref{{{reference}}}, continued.}}")
        floats.append(
            f"\\begin{{table}}\n\\centering\\footnotesize\\setlength{{\\tabcolsep}}{{3pt}}\n"
            f"{captions[len(floats)]}\n\\smallskip\n{_tabular(table, block, names)}\n"
            "\\end{table}\n"
        )
    provenance = [f"{key}: {value}" for key, value in results.manifest["provenance"].items()]
    comments = [*HINTS, *provenance, *results.manifest["notes"]]
    return "".join(f"% {' '.join(comment.split())}\n" for comment in comments) + "".join(floats)


def latex_contrasts(results: Results, found: Sequence[Estimate]) -> str:
    """Format the declared contrasts as one LaTeX float."""
    reference = "tab:" + re.sub("[^A-Za-z0-9]+", "-", results.name) + "-contrasts"
    heads = contrast_heads(found)
    lines = [[_latex_cell(cell) for cell in line] for line in contrast_lines(found)]
    caption = escape_latex(f"{results.question} {contrasts_caption(results)}")
    return "\n".join(
        [
            f"% {HINTS[0]}",
            r"\begin{table}",
            r"\centering\footnotesize\setlength{\tabcolsep}{3pt}",
            rf"\caption{{{caption}}}",
            rf"\label{{{reference}}}",
            r"\smallskip",
            r"\begin{tabular}{llrrrl}",
            r"\toprule",
            rf"{' & '.join(map(_latex_head, heads))} \\",
            r"\midrule",
            *(rf"{' & '.join(line)} \\" for line in lines),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _tabular(table: Table, block: Sequence[int], names: int) -> str:
    """Format a block of columns without its empty rows (references have no costs)."""
    body = []
    references = False
    for row, cells in table.lines:
        texts = [_latex_cell(cells[i]) for i in block]
        if all(text == "--" for text in texts[names:]):
            continue
        if references and not row.reference:
            body.append(r"\midrule")
        references = row.reference
        body.append(rf"{' & '.join(texts)} \\")
    lines = [
        rf"\begin{{tabular}}{{{'l' * names}{'r' * (len(block) - names)}}}",
        r"\toprule",
        rf"{' & '.join(_latex_head(table.heads[i]) for i in block)} \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines)


def _latex_cell(cell: Cell) -> str:
    text = escape_latex(cell.text).replace(" $\\pm$ ", r"\,$\pm$\,")
    text = rf"\textbf{{{text}}}" if cell.best else text
    return text + (f"$^{{{','.join(map(str, cell.marks))}}}$" if cell.marks else "")


def _latex_head(text: str) -> str:
    """Break a column's head into lines, at spaces and after underscores."""
    lines = [""]
    for word in re.findall(r"[^\s_]*_|\S+", text):
        glue = "" if not lines[-1] or lines[-1].endswith("_") else " "
        if lines[-1] and len(lines[-1] + glue + word) > HEAD_LETTERS:
            lines.append(word)
        else:
            lines[-1] += glue + word
    escaped = r"\\".join(map(escape_latex, lines))
    return escaped if len(lines) == 1 else rf"\shortstack{{{escaped}}}"


def escape_latex(text: str) -> str:
    """Write plain text as one LaTeX paragraph, which may follow a line break; pdflatex sets it.

    Letters that its default fonts lack become their base letters, other characters `?`.
    """
    plain = unicodedata.normalize("NFC", " ".join(text.split()))
    escaped = "".join(map(_symbol, plain))
    return f"{{}}{escaped}" if escaped.startswith(("[", "*")) else escaped  # options of \\


def _symbol(character: str) -> str:
    if character in SYMBOLS:
        return SYMBOLS[character]
    latin = ord(character) < 0x180 and character not in BEYOND_OT1  # with accents
    if character.isprintable() and (latin or character in "–‘’“”…"):
        return character
    parts = unicodedata.normalize("NFKD", character)
    letters = [part for part in parts if not unicodedata.combining(part)]
    struck_out = len(letters) < len(parts) and not all(map(str.isalpha, letters))
    if letters == [character] or struck_out:
        return "?"
    symbols = "".join(map(_symbol, letters))
    return "?" if symbols.strip("?") == "" and symbols else symbols
