"""Words in labels belong to keys of a run and to values that these keys can have."""

from typing import Annotated, Any

import pytest
from pydantic import TypeAdapter, ValidationError

from distill_bench.config.schema import RunConfig
from distill_bench.report.labels import WORDINGS

BOOLEANS = {"True": True, "False": False}


def allowed(key: str, value: Any) -> bool:
    """True if a run's key can have the value."""
    field = RunConfig.model_fields[key]
    try:
        TypeAdapter(Annotated[field.annotation, field]).validate_python(value)
    except ValidationError:
        return False
    return True


def test_words_are_for_keys_of_a_run():
    assert WORDINGS.keys() - RunConfig.model_fields.keys() == set()


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, words in WORDINGS.items() for value in words.words]
)
def test_words_are_for_values_of_their_key_and_name_them(key, value):
    words = WORDINGS[key].words[value]
    if value:
        assert allowed(key, BOOLEANS.get(value, value))
        if value not in BOOLEANS:
            assert value.replace("_", "-") in words.lower().replace(" ", "-")
    else:
        assert allowed(key, None) or allowed(key, "")
        assert words.startswith("no ")
