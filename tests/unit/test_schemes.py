"""What a scheme's name means."""

from __future__ import annotations

import dataclasses

import pytest

from hf_quant.schemes import SCHEMES, Scheme, get_scheme


def test_the_three_schemes_and_their_activations() -> None:
    assert {name: scheme.activations for name, scheme in SCHEMES.items()} == {
        "int8_dynamic": "dynamic",
        "int8_static": "static",
        "int8_weight_only": None,
    }
    assert all(name == scheme.name for name, scheme in SCHEMES.items())


def test_a_scheme_is_found_by_name_and_passes_through() -> None:
    assert get_scheme("int8_static") is SCHEMES["int8_static"]
    own = Scheme("mine", None, "an own one")
    assert get_scheme(own) is own


def test_schemes_cannot_be_changed_by_accident() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SCHEMES["int8_static"].activations = None  # type: ignore[misc]


def test_unknown_scheme_names_value_suggestion_and_choices() -> None:
    with pytest.raises(
        ValueError,
        match=r"unknown scheme 'int8_statik'; did you mean 'int8_static'\? "
        r"Choose one of: int8_dynamic, int8_static, int8_weight_only\.",
    ):
        get_scheme("int8_statik")


def test_a_name_near_to_nothing_gets_no_suggestion_but_the_choices() -> None:
    with pytest.raises(ValueError, match=r"unknown scheme 'fp4'.* Choose one of: int8_dynamic") as caught:
        get_scheme("fp4")
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("wrong", [None, 8, True, ["int8_static"], {}])
def test_what_is_no_string_is_refused_in_the_same_words(wrong: object) -> None:
    with pytest.raises((ValueError, TypeError), match=r"Choose one of: int8_dynamic"):
        get_scheme(wrong)  # type: ignore[arg-type]
