"""What a scheme's name means."""

from __future__ import annotations

import dataclasses

import pytest

from hf_quant.schemes import GROUP_SIZES, SCHEMES, Scheme, get_scheme


def test_the_usual_schemes() -> None:
    assert {name: (scheme.activations, scheme.bits, scheme.group_size) for name, scheme in SCHEMES.items()} == {
        "int8_dynamic": ("dynamic", 8, None),
        "int8_static": ("static", 8, None),
        "int8_weight_only": (None, 8, None),
        "int4_weight_only": (None, 4, 32),
        "int4_dynamic": ("dynamic", 4, 32),
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
        r"Choose one of: int8_dynamic, int8_static, int8_weight_only, int4_weight_only, int4_dynamic; or another "
        r"number of bits \(2 to 8\) and group size, such as int6_weight_only or int4_weight_only_g128\.",
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


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", ["dynamic", "dynamic_symmetric", "weight_only"])
@pytest.mark.parametrize("group", [None, *GROUP_SIZES])
def test_bits_and_groups_are_read_off_the_name(bits: int, kind: str, group: int | None) -> None:
    name = f"int{bits}_{kind}" + (f"_g{group}" if group else "")
    scheme = get_scheme(name)
    default = 32 if bits < 8 else None
    assert (scheme.bits, scheme.group_size) == (bits, group or default)
    assert scheme.activations == (None if kind == "weight_only" else "dynamic")
    assert scheme.symmetric is (kind == "dynamic_symmetric")
    assert scheme.packed is (bits < 8 or group is not None)
    assert get_scheme(scheme.name) == scheme, "the name says it all"
    assert (scheme.name in SCHEMES) is (scheme is SCHEMES.get(scheme.name))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "int4_weight_only_g48",
            r"has groups of 48; allowed: 32, 64, 128\. Write, for example, int4_weight_only_g32\.",
        ),
        (
            "int4_static",
            r"'int4_static': static activations go with int8 weights per channel\. Use int8_static, or int4_",
        ),
        ("int8_static_g32", r"static activations go with int8 weights per channel"),
        ("int9_dynamic", r"unknown scheme 'int9_dynamic'; did you mean '"),
        ("int1_weight_only", r"unknown scheme 'int1_weight_only'"),
    ],
)
def test_what_there_is_not_names_what_there_is(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_scheme(name)


def test_one_scale_a_channel_for_few_bits_has_a_name_too() -> None:
    scheme = get_scheme("int4_weight_only_channel")
    assert (scheme.bits, scheme.group_size, scheme.packed) == (4, None, True)
    assert get_scheme("int8_weight_only_channel") is SCHEMES["int8_weight_only"]
