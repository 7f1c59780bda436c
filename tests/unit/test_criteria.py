"""Scores of weights: closed forms, sums, seeds, half precision, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_quant.pruning.criteria import CRITERIA, Criterion, get_criterion

NAMES = [*CRITERIA, "l1", "l3", "block_fisher_8"]
GATHERING = [name for name in NAMES if get_criterion(name).needs_gradients]
AVERAGED = ["first_order", "fisher", "block_fisher"]
HALVES = [torch.float16, torch.bfloat16]


def gathered(criterion: Criterion, weights: list[Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
    """The state after one gradient for each of the weights, which are those of successive steps."""
    state = criterion.new_state(weights[0])
    for weight, gradient in zip(weights, gradients, strict=True):
        criterion.accumulate(weight, gradient, state)
    return state


def scores(
    name: str, weights: list[Tensor], gradients: list[Tensor], seed: int = 0, state: dict[str, Tensor] | None = None
) -> Tensor:
    criterion = get_criterion(name)
    state = gathered(criterion, weights, gradients) if state is None else state
    return criterion.score(weights[-1], state, torch.Generator().manual_seed(seed))


def steps(count: int = 5, shape: tuple[int, ...] = (6, 7), seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return (
        [torch.randn(shape, generator=generator) for _ in range(count)],
        [torch.randn(shape, generator=generator) for _ in range(count)],
    )


def test_movement_sums_up_minus_weight_times_gradient() -> None:
    weights, gradients = steps()
    expected = torch.zeros(6, 7)
    for weight, gradient in zip(weights, gradients, strict=True):
        expected -= weight * gradient
    torch.testing.assert_close(scores("movement", weights, gradients), expected, rtol=1e-6, atol=1e-6)


def test_movement_is_positive_where_descent_leads_away_from_zero() -> None:
    weight, gradient = torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.tensor([-1.0, 1.0, 1.0, -1.0])
    moved = (weight - 0.1 * gradient).abs() > weight.abs()
    assert torch.equal(scores("movement", [weight], [gradient]) > 0, moved)


def test_soft_movement_is_its_formula() -> None:
    weights, gradients = steps(30)
    for weight in weights:
        weight[0] = 0.0  # pruned weights are no part of the mean
    expected = torch.zeros(6, 7, dtype=torch.float64)
    for weight, gradient in zip(weights, gradients, strict=True):
        step = weight.double() * gradient.double()
        slope = expected.sigmoid() * (1 - expected.sigmoid())
        expected = expected - 0.01 * (step / step[1:].square().mean().sqrt() + slope)
    found = scores("soft_movement", weights, gradients)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_soft_movement_does_not_depend_on_the_size_of_gradients_and_pulls_scores_down() -> None:
    weights, gradients = steps(10)
    found = scores("soft_movement", weights, gradients)
    smaller = scores("soft_movement", weights, [1e-6 * gradient for gradient in gradients])
    torch.testing.assert_close(found, smaller, rtol=1e-4, atol=1e-6)
    still = scores("soft_movement", weights, [torch.zeros_like(gradient) for gradient in gradients])
    torch.testing.assert_close(still, torch.full_like(still, -0.025), rtol=1e-3, atol=0)


def test_pull_of_soft_movement_lets_strong_scores_be() -> None:
    criterion = get_criterion("soft_movement")
    state = {"movement": torch.tensor([-6.0, 0.0, 6.0]), "kept": torch.zeros(3)}
    before = state["movement"].clone()
    criterion.accumulate(torch.ones(3), torch.zeros(3), state)
    pull = before - state["movement"]
    assert pull[1] > 50 * pull[0]
    assert pull[1] > 50 * pull[2] > 0


def test_first_order_is_the_weight_times_the_mean_gradient() -> None:
    weights, gradients = steps()
    mean = sum(gradients) / 5  # type: ignore[arg-type]
    torch.testing.assert_close(scores("first_order", weights, gradients), (weights[-1] * mean).abs())


def test_fisher_is_half_the_squared_weight_times_the_mean_squared_gradient() -> None:
    weights, gradients = steps()
    mean = sum(gradient**2 for gradient in gradients) / 5  # type: ignore[arg-type]
    torch.testing.assert_close(scores("fisher", weights, gradients), weights[-1] ** 2 * mean / 2)


def test_first_order_predicts_the_change_of_a_linear_loss() -> None:
    torch.manual_seed(0)
    weight, slope = torch.randn(5, requires_grad=True), torch.randn(5)
    (weight @ slope).backward()
    found = scores("first_order", [weight.detach()], [weight.grad])  # type: ignore[list-item]
    for index in range(5):
        pruned = weight.detach().clone()
        pruned[index] = 0
        assert found[index] == pytest.approx(float((pruned @ slope - weight.detach() @ slope).abs()), rel=1e-5)


@pytest.mark.parametrize("name", AVERAGED)
def test_means_begin_anew_after_an_update(name: str) -> None:
    weights, gradients = steps()
    criterion = get_criterion(name)
    state = gathered(criterion, weights, gradients)
    criterion.renew(state)
    assert not any(bool(tensor.any()) for tensor in state.values())
    later, found = steps(3, seed=1)
    for weight, gradient in zip(later, found, strict=True):
        criterion.accumulate(weight, gradient, state)
    assert torch.equal(scores(name, later, found), scores(name, later, found, state=state))


def test_a_pruned_weight_keeps_its_value_and_its_score_goes_on() -> None:
    """Straight through: dL/dS = W * dL/d(W * M), with the value that the weight had, whether its mask is 1 or 0."""
    criterion = get_criterion("movement")
    weight, pruned = torch.tensor([1.0, -2.0, 3.0, 0.5]), torch.tensor([True, False, True, False])
    state = criterion.new_state(weight)
    dense = weight.clone()
    criterion.compensate(weight, pruned, state)
    weight.mul_(~pruned)  # the caller's part
    assert weight.tolist() == [0.0, -2.0, 0.0, 0.5]
    gradient = torch.tensor([0.1, 0.2, -0.3, 0.4])
    criterion.accumulate(weight, gradient, state)
    torch.testing.assert_close(state["movement"], -dense * gradient)
    weight[1] = -2.5  # training goes on
    criterion.compensate(weight, torch.tensor([False, True, True, False]), state)
    assert weight[0] == 1.0, "the first one returns with its value"
    assert state["kept"].tolist() == [0.0, -2.5, 3.0, 0.0]


@pytest.mark.parametrize("name", ["movement", "soft_movement"])
def test_movement_goes_on_after_an_update(name: str) -> None:
    criterion = get_criterion(name)
    state = gathered(criterion, *steps())
    before = state["movement"].clone()
    criterion.renew(state)
    assert torch.equal(state["movement"], before)
    assert before.any()


@settings(max_examples=30)
@given(st.integers(1, 8), st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=20))
def test_powers_rank_single_weights_alike_and_rows_by_their_norm(power: int, values: list[float]) -> None:
    weight = torch.tensor(values)
    found = scores(f"l{power}", [weight], [weight])
    torch.testing.assert_close(found, weight.abs() ** power)
    assert bool((found[weight.abs().argsort()].diff() >= 0).all())
    assert float(found.sum()) ** (1 / power) == pytest.approx(float(weight.double().norm(power)), rel=1e-4, abs=1e-5)


def test_magnitude_is_l1() -> None:
    weights, gradients = steps()
    assert torch.equal(scores("magnitude", weights, gradients), scores("l1", weights, gradients))
    assert torch.equal(scores("magnitude", weights, gradients), weights[-1].abs())


@settings(max_examples=20)
@given(st.sampled_from([n for n in NAMES if n != "random" and "block" not in n]), st.integers(0, 1000))
def test_scores_follow_a_permutation_of_the_weights(name: str, seed: int) -> None:
    weights, gradients = steps(3, (24,), seed)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
    found = scores(name, weights, gradients)[order]
    permuted = scores(name, [weight[order] for weight in weights], [gradient[order] for gradient in gradients])
    torch.testing.assert_close(found, permuted, rtol=1e-5, atol=1e-7)


@settings(max_examples=20)
@given(
    st.sampled_from([n for n in NAMES if n not in ("random", "soft_movement")]), st.integers(1, 5), st.integers(1, 5)
)
def test_the_score_of_a_whole_is_the_sum_of_its_parts(name: str, upper: int, lower: int) -> None:
    """Rows of 16 are whole blocks, so a matrix may be cut between rows."""
    weights, gradients = steps(3, (upper + lower, 16))
    whole = scores(name, weights, gradients).sum()
    above = scores(name, [weight[:upper] for weight in weights], [one[:upper] for one in gradients]).sum()
    below = scores(name, [weight[upper:] for weight in weights], [one[upper:] for one in gradients]).sum()
    torch.testing.assert_close(whole, above + below, rtol=1e-4, atol=1e-5)


@settings(max_examples=20)
@given(st.sampled_from(["movement", "first_order", "fisher"]), st.integers(1, 6), st.integers(1, 6))
def test_what_is_gathered_is_additive_over_steps(name: str, first: int, second: int) -> None:
    weights, gradients = steps(first + second)
    criterion = get_criterion(name)
    whole = gathered(criterion, weights, gradients)
    one = gathered(criterion, weights[:first], gradients[:first])
    two = gathered(criterion, weights[first:], gradients[first:])
    for key, tensor in whole.items():
        torch.testing.assert_close(tensor, one[key] + two[key])


def test_random_is_a_function_of_the_seed() -> None:
    weights, gradients = steps(1, (40, 50))
    first, again, other = (scores("random", weights, gradients, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0 <= float(first.min()) < 0.01 < 0.99 < float(first.max()) < 1
    assert abs(float(torch.corrcoef(torch.stack([first.flatten(), weights[0].abs().flatten()]))[0, 1])) < 0.1


def test_random_draws_on_from_one_generator() -> None:
    criterion, generator = get_criterion("random"), torch.Generator().manual_seed(0)
    weight = torch.ones(10)
    assert not torch.equal(criterion.score(weight, {}, generator), criterion.score(weight, {}, generator))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_summed_up_in_float32(name: str, dtype: torch.dtype) -> None:
    weights, gradients = steps(40)
    halves = [weight.to(dtype) for weight in weights], [gradient.to(dtype) for gradient in gradients]
    found = scores(name, *halves)
    assert found.dtype == torch.float32
    expected = scores(name, [weight.float() for weight in halves[0]], [gradient.float() for gradient in halves[1]])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    mixed = scores(name, [weight.float() for weight in halves[0]], halves[1])
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_float64_weights_are_scored_in_float32(name: str) -> None:
    weights, gradients = steps(3)
    found = scores(name, [weight.double() for weight in weights], [gradient.double() for gradient in gradients])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, scores(name, weights, gradients), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", GATHERING)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e30, 1e17])
def test_gradients_that_are_not_finite_are_not_counted(name: str, bad: float) -> None:
    weights, gradients = steps(4)
    poisoned = gradients[1].clone()
    poisoned[2, 3] = bad
    found = scores(name, [weights[0], weights[1], *weights[1:]], [gradients[0], poisoned, *gradients[1:]])
    assert torch.equal(found, scores(name, weights, gradients))
    assert found.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_without_a_gradient_scores_are_finite(name: str) -> None:
    weight = torch.randn(5, 9)
    criterion = get_criterion(name)
    found = criterion.score(weight, criterion.new_state(weight), torch.Generator())
    assert found.shape == weight.shape
    assert found.isfinite().all()
    if name in GATHERING:
        assert not found.any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(33,), (5, 9), (3, 4, 5), (1, 1)])
def test_weights_of_any_shape_and_layout(name: str, shape: tuple[int, ...]) -> None:
    weights, gradients = steps(3, shape)
    found = scores(name, weights, gradients)
    assert found.shape == shape
    strided = [weight.mT.contiguous().mT if weight.ndim > 1 else weight for weight in weights]
    torch.testing.assert_close(found, scores(name, strided, gradients))


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_is_scored_without_a_graph_and_stays_as_it_is(name: str) -> None:
    parameter = nn.Parameter(torch.randn(4, 16))
    before, gradient = parameter.detach().clone(), torch.randn(4, 16)
    criterion = get_criterion(name)
    state = criterion.new_state(parameter)
    tensors = dict(state)
    criterion.accumulate(parameter, gradient, state)
    found = criterion.score(parameter, state, torch.Generator())
    assert not found.requires_grad
    assert not any(tensor.requires_grad for tensor in state.values())
    assert all(state[key] is tensor for key, tensor in tensors.items())  # in place: they are a module's buffers
    found.fill_(7.0)
    assert torch.equal(parameter, before)
    assert not any(bool((tensor == 7).any()) for tensor in state.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(6, 16), (5, 9), (7,)])
def test_memory_is_what_the_state_takes(name: str, shape: tuple[int, ...]) -> None:
    criterion = get_criterion(name)
    weight = torch.zeros(shape, dtype=torch.bfloat16)
    state = criterion.new_state(weight)
    assert criterion.memory(weight.numel()) == sum(tensor.untyped_storage().nbytes() for tensor in state.values())
    assert not any(bool(tensor.any()) for tensor in state.values())
    assert criterion.needs_gradients == bool(state)


@pytest.mark.parametrize(
    ("name", "floats", "extra"),
    [
        ("magnitude", 0, 0),
        ("l2", 0, 0),
        ("random", 0, 0),
        ("movement", 2, 0),
        ("soft_movement", 2, 0),
        ("first_order", 1, 8),
        ("fisher", 1, 8),
        ("block_fisher", 16, 8),
        ("block_fisher_64", 64, 8),
    ],
)
def test_memory_of_a_thousand_blocks(name: str, floats: int, extra: int) -> None:
    criterion = get_criterion(name)
    assert criterion.floats_per_weight == floats
    assert criterion.memory(64_000) == 4 * floats * 64_000 + extra


@pytest.mark.parametrize("name", [name for name in NAMES if "block" not in name])
def test_only_block_fisher_moves_other_weights(name: str) -> None:
    weights, gradients = steps()
    criterion, weight = get_criterion(name), weights[-1].clone()
    criterion.compensate(weight, weight > 0, gathered(criterion, weights, gradients))
    assert torch.equal(weight, weights[-1])


@pytest.mark.parametrize("name", NAMES)
def test_names(name: str) -> None:
    assert get_criterion(name).name == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("magnitud", "unknown criterion 'magnitud'; did you mean 'magnitude'\\? Choose one of: magnitude, l2, random"),
        ("block-fisher", "did you mean 'block_fisher'\\?"),
        ("movment", "did you mean 'movement'\\?"),
        ("zzz", "unknown criterion 'zzz'\\. Choose one of: .*block_fisher"),
        ("", "unknown criterion ''\\."),
        (2, "unknown criterion 2; did you mean 'l2'\\?"),
        ("l0", "criterion 'l0': 0 is not among the powers whose values float32 holds, 1 to 8. Write l1"),
        ("l20", "criterion 'l20': 20 is not among the powers .* Write l8"),
        ("block_fisher_1", "1 is not among the weights in a block, 2 to 128. Write block_fisher_2"),
        ("block_fisher_4096", "Write block_fisher_128"),
        ("block_fisher_x", "unknown criterion 'block_fisher_x'; did you mean 'block_fisher'\\?"),
    ],
)
def test_unknown_names_are_errors(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_criterion(name)
