"""Format table.md: all tables of a study with their captions."""

from collections.abc import Sequence

from distill_bench.report.results import Column, Results
from distill_bench.report.rows import Row
from distill_bench.report.tables.contrasts import (
    contrast_grid,
    contrasts_caption,
    estimates,
    sides,
)
from distill_bench.report.tables.differences import against_baseline, cost_ratio, verdict
from distill_bench.report.tables.scores import (
    Cell,
    Table,
    differences_caption,
    equal_cost_caption,
    equal_cost_differences,
    equal_cost_differences_caption,
    footnotes_of,
    holm_head,
    score_caption,
    show_interval,
    show_p,
)


def markdown(results: Results, scores: Table, at_cost: Table) -> str:
    """Return the text of table.md."""
    parts = [results.question] if results.question else []
    parts += _contrast_parts(results)
    parts += ["## At the end of training", _markdown_table(scores), score_caption(results)]
    parts += [f"[{number}] {text}." for number, text in footnotes_of(results, scores)]
    parts += [f"Note: {note}." for note in results.manifest["notes"]]
    parts += ["## At equal cost", _markdown_table(at_cost), equal_cost_caption(results)]
    baseline, apart = results.baseline, equal_cost_differences(results)
    prefix = "Exploratory: " if results.contrasts else ""
    if apart:
        parts += [
            f"## {prefix}At equal cost: difference to {baseline.label}",
            _markdown_table(apart),
            equal_cost_differences_caption(results),
        ]
    if baseline and len(results.students) > 1:
        for column in results.headline:
            parts.append(f"## {prefix}{column.heading}: difference to {baseline.label}")
            parts.append(_markdown_differences(results, column, baseline))
        parts.append(differences_caption(results))
    provenance = results.manifest["provenance"].items()
    parts.append(f"From {', '.join(f'{key} {value}' for key, value in provenance)}.")
    return "\n\n".join(parts) + "\n"


def _contrast_parts(results: Results) -> list[str]:
    """Table of the declared contrasts, its caption, and the rows of each contrast."""
    found = estimates(results)
    if not found:
        return []
    heads, lines = contrast_grid(found)
    rows = [f"- {one['name']}: {sides(results, one)}" for one in results.contrasts]
    return [
        "## Declared contrasts",
        _pipe_table([heads, *([_markdown_cell(cell) for cell in line] for line in lines)]),
        f"{contrasts_caption(results)} Every p stands in contrasts.csv.",
        "\n".join(rows),
    ]


def _markdown_differences(results: Results, column: Column, baseline: Row) -> str:
    family = against_baseline(results, column, baseline)
    lines = [["row", "seeds", "difference", holm_head(family), "favours", "cost"]]
    for difference, p in family:
        ratio = cost_ratio(difference.a, baseline)
        lines.append(
            [
                difference.a.label,
                str(difference.seeds),
                show_interval(difference.interval, sign="+"),
                show_p(p),
                verdict(difference, p) or "neither",
                f"{ratio:.2f} x" if ratio else "—",
            ]
        )
    return _pipe_table(lines)


def _markdown_table(table: Table) -> str:
    lines = [table.heads]
    for _, line in table.lines:
        lines.append([_markdown_cell(cell) for cell in line])
    return _pipe_table(lines)


def _markdown_cell(cell: Cell) -> str:
    text = f"**{cell.text}**" if cell.best else cell.text
    return text + "".join(f" [{mark}]" for mark in cell.marks)


def _pipe_table(lines: Sequence[Sequence[str]]) -> str:
    escaped = [[text.replace("|", "\\|") for text in line] for line in lines]
    escaped.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)
