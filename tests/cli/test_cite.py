"""BibTeX of methods and evaluators, from the papers that they declare."""

import re
from pathlib import Path

import pytest

from distill_bench.cli import main
from distill_bench.evaluator import Citation
from distill_bench.registry import evaluators, methods

ODD = Citation("2601.00001", "Fast & Slow: 5% of $x_0$", "Ada de Möbius, Bo Li", 2026)

OWN = '''
from dataclasses import dataclass
from typing import ClassVar
from distill_bench.evaluator import Evaluator

@dataclass(frozen=True)
class Own(Evaluator):
    """Mine."""
    paper: ClassVar[str] = "none"
    version: ClassVar[int] = 1
    def scores(self, clips, references): ...
'''


def test_an_entry_escapes_what_tex_reads_and_keeps_the_capitals():
    entry = ODD.bibtex()
    assert r"title = {{Fast \& Slow: 5\% of \$x\_0\$}}" in entry
    assert "author = {Ada de Möbius and Bo Li}" in entry
    assert entry.startswith("@misc{mobius2026fast,")
    assert entry.count("{") - entry.count("}") == 0
    assert str(ODD) == "arXiv:2601.00001"


def test_every_arxiv_number_of_a_plugin_is_a_citation_with_a_key_of_its_own():
    papers = [plugin.paper for plugin in [*methods().values(), *evaluators().values()]]
    assert not [p for p in papers if isinstance(p, str) and p.startswith("arXiv:")]
    citations = {paper for paper in papers if isinstance(paper, Citation)}
    assert len(citations) > 10
    assert len({c.key for c in citations}) == len({c.arxiv for c in citations}) == len(citations)
    for citation in citations:
        assert re.fullmatch(r"\d{4}\.\d{5}", citation.arxiv)
        # arXiv numbers begin with year and month of the first version
        assert citation.year == 2000 + int(citation.arxiv[:2])
        assert all(len(name.split()) >= 2 for name in citation.authors.split(", "))


def test_methods_that_share_a_paper_cite_it_once(capsys):
    assert main(["cite", "sgmd", "tsg_sim", "dmd2"]) == 0
    entries = re.findall(r"^@misc\{(\w+),", capsys.readouterr().out, re.MULTILINE)
    assert entries == ["wu2026sgmd", "yin2024improved"]


@pytest.mark.parametrize("names", [["sgdm"], ["dmd2", "sgdm"]])
def test_an_unknown_name_is_an_error_of_one_line_with_the_known_ones(names, capsys):
    assert main(["cite", *names]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    assert "no method or evaluator called 'sgdm' (did you mean 'sgmd'?); known: " in error
    assert " fvd," in error and " sid," in error


def test_a_plugin_without_a_paper_says_so(tmp_path: Path, capsys):
    (tmp_path / "own.py").write_text(OWN)
    assert main(["cite", f"{tmp_path}/own.py:Own"]) == 1
    assert "own.py:Own has no paper on arXiv; source: none" in capsys.readouterr().err
