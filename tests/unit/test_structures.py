"""Masks from scores: exact counts, the lowest scores, and the structure that was asked for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_quant.pruning.structures import blocks_of, choose, choose_units, get_structure, lowest

NAMES = ("unstructured", "2:4", "1:4", "4:8", "1x4", "4x1", "8x2", "row", "column")


def _scores(*shapes: tuple[int, int], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layer{i}": torch.rand(shape, generator=generator) for i, shape in enumerate(shapes)}


def _none(scores):
    return {name: torch.zeros_like(score, dtype=torch.bool) for name, score in scores.items()}


def _share(masks) -> float:
    return sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


@pytest.mark.parametrize("scope", ["global", "layer"])
@settings(max_examples=25, deadline=None)
@given(goal=st.floats(0.05, 0.9), seed=st.integers(0, 1000))
def test_unstructured_prunes_exactly_the_lowest(scope, goal, seed):
    scores = _scores((16, 24), (8, 40), seed=seed)
    chosen = choose(scores, _none(scores), dict.fromkeys(scores, goal), get_structure("unstructured"), scope)
    sets = [list(scores)] if scope == "global" else [[name] for name in scores]
    for names in sets:
        mask = torch.cat([chosen[name].flatten() for name in names])
        score = torch.cat([scores[name].flatten() for name in names])
        assert int(mask.sum()) == round(goal * len(mask))
        assert score[mask].max() <= score[~mask].min()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_every_structure_meets_its_goal_in_whole_blocks(name, scope):
    structure = get_structure(name)
    scores = _scores((32, 64), (64, 32))
    goal = structure.sparsity or 0.5
    chosen = choose(scores, _none(scores), dict.fromkeys(scores, goal), structure, scope)
    assert _share(chosen) == pytest.approx(goal, abs=1 / 64)
    for mask in chosen.values():
        if structure.kind == "n_m":
            assert bool((mask.view(-1, structure.of).sum(1) == structure.of - structure.keep).all())
        else:
            rows, columns = structure.block(mask.shape)
            blocks = mask.reshape(mask.shape[0] // rows, rows, mask.shape[1] // columns, columns).float().mean((1, 3))
            assert bool(((blocks == 0) | (blocks == 1)).all())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_pruned_stays_pruned_along_a_schedule(name, scope):
    structure = get_structure(name)
    final = structure.sparsity or 0.75
    pruned = _none(_scores((32, 64), (64, 32)))
    for update in range(1, 6):
        scores = _scores((32, 64), (64, 32), seed=update)  # other scores each time
        later = choose(scores, pruned, dict.fromkeys(scores, final * update / 5), structure, scope)
        assert all(bool((later[layer] | ~pruned[layer]).all()) for layer in pruned)
        assert _share(later) == pytest.approx(final * update / 5, abs=1 / 64)
        pruned = later


def test_n_m_keeps_the_best_of_each_group():
    scores = {"a": torch.tensor([[4.0, 1.0, 3.0, 2.0], [1.0, 2.0, 3.0, 4.0]])}
    chosen = choose(scores, _none(scores), {"a": 0.5}, get_structure("2:4"), "global")
    assert chosen["a"].tolist() == [[False, True, False, True], [True, True, False, False]]


def test_rows_of_different_length_compare_by_their_mean():
    scores = {"long": torch.full((4, 100), 1.0), "short": torch.full((4, 10), 2.0)}
    scores["long"][0] = 0.1
    chosen = choose(scores, _none(scores), dict.fromkeys(scores, 100 / 440), get_structure("row"), "global")
    assert chosen["long"][:, 0].tolist() == [True, False, False, False]
    assert not chosen["short"].any()


def test_a_single_zero_does_not_condemn_its_block():
    scores = {"a": torch.arange(64.0).view(8, 8) + 1}
    pruned = _none(scores)
    pruned["a"][7, 7] = True  # a zero of the dense model in the best block
    chosen = choose(scores, pruned, {"a": 0.5}, get_structure("4x4"), "global")
    assert chosen["a"][:4].all()
    assert not chosen["a"][4:].any()


def test_each_layer_keeps_its_best_block():
    scores = {"weak": torch.rand(4, 4) * 1e-6, "strong": 1 + torch.rand(40, 40)}
    chosen = choose(scores, _none(scores), dict.fromkeys(scores, 0.9), get_structure("unstructured"), "global")
    assert int((~chosen["weak"]).sum()) == 1
    assert bool((~chosen["weak"]).flatten()[scores["weak"].argmax()])
    assert _share(chosen) == pytest.approx(0.9, abs=1e-3)


def test_own_goals_by_layer_compete_only_with_equal_ones():
    scores = _scores((16, 16), (16, 16), (16, 16))
    goals = {"layer0": 0.25, "layer1": 0.75, "layer2": 0.75}
    chosen = choose(scores, _none(scores), goals, get_structure("unstructured"), "global")
    assert int(chosen["layer0"].sum()) == 64
    assert int(chosen["layer1"].sum() + chosen["layer2"].sum()) == 384


@given(values=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=4, max_size=40), share=st.floats(0, 0.9))
def test_ties_do_not_change_the_count(values, share):
    group = torch.tensor(values)
    count = min(round(share * len(values)), len(values) - 1)
    (marked,) = lowest([group], [1], count)
    assert int(marked.sum()) == count
    assert group.tolist() == values  # scores are the caller's


def test_units_that_must_stay_do():
    scores = {"heads": torch.tensor([torch.inf, 1.0, 2.0, 3.0])}
    none = {"heads": torch.zeros(4, dtype=torch.bool)}
    assert choose_units(scores, none, {"heads": 0.5}, "global")["heads"].tolist() == [False, True, True, False]
    assert choose_units(scores, none, {"heads": 0.99}, "layer")["heads"].tolist()[0] is False


def test_blocks_of_needs_all_of_a_block():
    mask = torch.tensor([[True, True, True, False]])
    assert blocks_of(mask, get_structure("1x2")).tolist() == [[True, False]]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("unstructred", "did you mean .*unstructured"),
        ("4:4", "more than 0 and fewer than 4"),
        ("0:4", "more than 0 and fewer than 4"),
        ("0x4", "holds no weight"),
        ("4x", "unknown structure"),
    ],
)
def test_unknown_structures(name, text):
    with pytest.raises(ValueError, match=text):
        get_structure(name)


@pytest.mark.parametrize(
    ("name", "text"),
    [("2:4", "30 inputs, which 2:4 does not divide"), ("4x1", "weight of 6 x 30, which blocks of 4x1")],
)
def test_shapes_that_do_not_divide(name, text):
    with pytest.raises(ValueError, match=text):
        get_structure(name).check("encoder.query", torch.Size((6, 30)))
