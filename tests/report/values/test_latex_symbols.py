"""The LaTeX of a symbol draws that symbol: held against matplotlib's own table of commands."""

import re
import unicodedata

import matplotlib as mpl
import pytest
from matplotlib.mathtext import MathTextParser

from distill_bench.report.tables.latex import SYMBOLS

SIMILAR = {"°": "∘", "·": "⋅", "«": "≪", "»": "≫"}  # drawn by a symbol that looks alike
UNKNOWN = "√"  # matplotlib has no \surd
MATHEMATICS = {s: text for s, text in SYMBOLS.items() if text[0] == "$" and s not in UNKNOWN}


def drawn(formula: str) -> str:
    """Characters that matplotlib draws for a formula."""
    with mpl.rc_context({"mathtext.fontset": "dejavusans"}):
        return "".join(chr(glyph[2]) for glyph in MathTextParser("path").parse(formula).glyphs)


def test_symbols_are_single_characters_and_their_latex_is_a_formula_a_command_or_signs():
    for symbol, text in SYMBOLS.items():
        assert len(symbol) == 1
        is_letter = text.isalpha() and len(text) == 1
        assert is_letter or re.fullmatch(r"\$[^$]+\$|\\text[a-z]+\{\}|[^A-Za-z0-9]+", text), text


@pytest.mark.parametrize("symbol", MATHEMATICS)
def test_a_formula_draws_its_symbol(symbol):
    expected = unicodedata.normalize("NFKC", SIMILAR.get(symbol, symbol))
    assert unicodedata.normalize("NFKC", drawn(MATHEMATICS[symbol])) == expected
