"""Block Fisher against dense linear algebra, and what one-shot pruning by it does to a trained model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_quant.pruning import fisher
from hf_quant.pruning.criteria import Criterion, get_criterion
from hf_quant.pruning.fisher import DAMPING, add_gradient, block_scores, compensate_blocks, new_blocks


def example(
    shape: tuple[int, ...], size: int, count: int = 12, seed: int = 0, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, gradients (count, *shape) whose elements go together, and the sum of their outer products."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    common = torch.randn(count, *[1] * len(shape), generator=generator)
    gradients = scale * (common + torch.randn(count, *shape, generator=generator))
    blocks = new_blocks(weight, size)
    for gradient in gradients:
        add_gradient(blocks, gradient)
    return weight, gradients, blocks


def dense(gradients: Tensor, alive: Tensor, size: int) -> list[tuple[slice, Tensor]]:
    """`lambda I + 1/m sum g g^T` of each block's living weights, in float64, with identity for the others."""
    flat, alive = gradients.double().flatten(1), alive.flatten()
    found = []
    for start in range(0, flat.shape[1], size):
        part = slice(start, min(start + size, flat.shape[1]))
        living = alive[part]
        matrix = flat[:, part].t() @ flat[:, part] / len(flat)
        mean = matrix.diagonal()[living].mean() if living.any() else 0.0
        matrix = matrix + DAMPING * mean * torch.eye(len(matrix), dtype=torch.float64)
        matrix[~living], matrix[:, ~living] = 0, 0
        matrix[~living, ~living] = 1
        found.append((part, matrix))
    return found


SHAPES = [((8, 16), 16), ((5, 7), 16), ((3, 10), 4), ((33,), 32), ((2,), 16), ((1, 1), 2), ((4, 3, 5), 8)]


@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_sum_of_outer_products(shape: tuple[int, ...], size: int) -> None:
    weight, gradients, blocks = example(shape, size)
    assert blocks.shape == (-(-weight.numel() // size), size, size)
    assert blocks.dtype == torch.float32
    whole = torch.zeros(len(blocks) * size, len(blocks) * size)
    whole[: weight.numel(), : weight.numel()] = gradients.flatten(1).t() @ gradients.flatten(1)
    for index, block in enumerate(blocks):
        own = slice(index * size, (index + 1) * size)
        torch.testing.assert_close(block, whole[own, own], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e-5, 1e3])
@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_scores_are_those_of_the_dense_inverse(shape: tuple[int, ...], size: int, scale: float) -> None:
    weight, gradients, blocks = example(shape, size, scale=scale)
    expected = torch.empty(weight.numel(), dtype=torch.float64)
    for part, matrix in dense(gradients, weight != 0, size):
        expected[part] = weight.double().flatten()[part] ** 2 / (2 * torch.linalg.inv(matrix).diagonal())
    found = block_scores(weight, blocks, torch.tensor(len(gradients)))
    torch.testing.assert_close(found.double().flatten(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_pruned_weights_make_up_for_nothing(shape: tuple[int, ...], size: int) -> None:
    weight, gradients, blocks = example(shape, size)
    weight = weight * (torch.rand(shape) > 0.4)
    found = block_scores(weight, blocks, torch.tensor(len(gradients)))
    assert torch.equal(found == 0, weight == 0)
    for part, matrix in dense(gradients, weight != 0, size):
        expected = weight.double().flatten()[part] ** 2 / (2 * torch.linalg.inv(matrix).diagonal())
        torch.testing.assert_close(found.double().flatten()[part], expected, rtol=1e-3, atol=0)


@settings(max_examples=40)
@given(st.sampled_from(SHAPES), st.integers(0, 1000), st.floats(0, 1), st.floats(0, 1), st.sampled_from([1, 4, 40]))
def test_compensation_is_the_minimum_of_the_quadratic_model(
    case: tuple[tuple[int, ...], int], seed: int, before: float, now: float, count: int
) -> None:
    shape, size = case
    torch.manual_seed(seed)
    weight, gradients, blocks = example(shape, size, count, seed, scale=1e-3)
    weight = weight * (torch.rand(shape) >= before)
    pruned = torch.rand(shape) < now
    found = weight.clone()
    compensate_blocks(found, pruned, blocks)
    assert not found[pruned | (weight == 0)].any()
    old, new, gone = weight.double().flatten(), found.double().flatten(), (pruned | (weight == 0)).flatten()
    for part, matrix in dense(gradients, weight != 0, size):
        # Least squares with equality constraints: the multipliers and the step in one linear system.
        fixed = torch.eye(len(matrix), dtype=torch.float64)[gone[part]]
        system = torch.cat(
            [torch.cat([matrix / matrix.trace(), fixed.t()], 1), torch.nn.functional.pad(fixed, (0, len(fixed)))]
        )
        side = torch.cat([torch.zeros(len(matrix), dtype=torch.float64), -old[part][gone[part]]])
        step = torch.linalg.solve(system, side)[: len(matrix)]
        torch.testing.assert_close(new[part], old[part] + step, rtol=2e-3, atol=2e-4)


def test_the_score_of_a_weight_is_what_the_loss_rises_by_once_it_is_compensated() -> None:
    weight, gradients, blocks = example((2, 8), 8)
    found = block_scores(weight, blocks, torch.tensor(len(gradients))).flatten()
    for index in range(16):
        pruned = torch.zeros(16, dtype=torch.bool)
        pruned[index] = True
        moved = weight.clone()
        compensate_blocks(moved, pruned.view(2, 8), blocks)
        step = (moved - weight).double().flatten()
        rise = sum(step[part] @ matrix @ step[part] / 2 for part, matrix in dense(gradients, weight != 0, 8))
        assert float(found[index]) == pytest.approx(float(rise), rel=1e-3)


def test_scores_lie_between_nothing_and_the_damped_diagonal() -> None:
    weight, gradients, blocks = example((20, 16), 16, count=100)
    count = torch.tensor(len(gradients))
    found = block_scores(weight, blocks, count)
    squares = gradients.square().mean(0)
    alone = weight**2 / 2 * (squares + DAMPING * squares.mean(1, keepdim=True))
    assert bool((found > 0).all())
    assert bool((found <= alone * 1.0001).all())
    assert bool((found < 0.9 * alone).any())


def test_gradients_that_do_not_go_together_compensate_nothing() -> None:
    """One weight of each block a gradient: F is diagonal, and block Fisher is diagonal Fisher but for the damping."""
    weight = torch.randn(4, 8)
    blocks, diagonal = new_blocks(weight, 8), torch.zeros(4, 8)
    for index in range(8):
        gradient = torch.zeros(4, 8)
        gradient[:, index] = torch.rand(4) + 1
        add_gradient(blocks, gradient)
        diagonal += gradient**2
    squares = diagonal / 8
    expected = weight**2 / 2 * (squares + DAMPING * squares.mean(1, keepdim=True))
    torch.testing.assert_close(block_scores(weight, blocks, torch.tensor(8)), expected)
    pruned = torch.rand(4, 8) < 0.5
    moved = weight.clone()
    compensate_blocks(moved, pruned, blocks)
    torch.testing.assert_close(moved, weight.masked_fill(pruned, 0))


def test_two_weights_that_do_the_same_replace_each_other() -> None:
    weight = torch.tensor([[1.0, 2.0, 5.0]])
    blocks = new_blocks(weight, 3)
    for sign in (1.0, -1.0):
        add_gradient(blocks, torch.tensor([[sign, sign, 0.0]]))
    compensate_blocks(weight, torch.tensor([[True, False, False]]), blocks)
    torch.testing.assert_close(weight, torch.tensor([[0.0, 3.0, 5.0]]), atol=0.02, rtol=0)


def test_gradients_far_apart_in_size_keep_scores_positive_and_finite() -> None:
    weight = torch.randn(64, 16)
    blocks = new_blocks(weight, 16)
    for index in range(50):
        gradient = torch.randn(64, 16) * torch.logspace(-6, 6, 16)
        gradient[:8] = torch.randn(8, 1) * 1e8 * (index == 0)
        gradient[8:16] = 0
        add_gradient(blocks, gradient)
    found = block_scores(weight, blocks, torch.tensor(50))
    assert found.isfinite().all()
    assert bool((found[:8] > 0).all())
    assert bool((found[16:] > 0).all())
    assert not found[8:16].any()
    pruned = torch.rand(64, 16) < 0.5
    moved = weight.clone()
    compensate_blocks(moved, pruned, blocks)
    assert moved.isfinite().all()
    assert torch.equal(moved[8:16], weight[8:16].masked_fill(pruned[8:16], 0))  # nothing known, nothing moved


@pytest.mark.parametrize("chunk", [1, 100, 1 << 20])
def test_chunks_do_not_matter(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gradients, blocks = example((21, 13), 8)
    pruned = torch.rand(21, 13) < 0.5
    count = torch.tensor(len(gradients))
    expected, moved = block_scores(weight, blocks, count), weight.clone()
    compensate_blocks(moved, pruned, blocks)
    monkeypatch.setattr(fisher, "_CHUNK", chunk)
    torch.testing.assert_close(block_scores(weight, blocks, count), expected)
    again = weight.clone()
    compensate_blocks(again, pruned, blocks)
    torch.testing.assert_close(again, moved)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_moved_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    weight, _, blocks = example((7, 9), 16)
    half = weight.to(dtype)
    exact, pruned = half.float(), torch.rand(7, 9) < 0.5
    compensate_blocks(exact, pruned, blocks)
    compensate_blocks(half, pruned, blocks)
    assert half.dtype == dtype
    assert torch.equal(half, exact.to(dtype))


def test_weights_that_are_not_contiguous_are_moved_in_place() -> None:
    weight, _, blocks = example((6, 10), 4)
    pruned = torch.rand(6, 10) < 0.5
    parameter = nn.Parameter(weight.t().contiguous().t())
    compensate_blocks(parameter, pruned, blocks)
    compensate_blocks(weight, pruned, blocks)
    assert torch.equal(parameter, weight)


def test_nothing_changes_where_nothing_is_pruned_and_sums_stay_as_they_are() -> None:
    weight, gradients, blocks = example((6, 10), 4)
    before, sums = weight.clone(), blocks.clone()
    compensate_blocks(weight, torch.zeros(6, 10, dtype=torch.bool), blocks)
    assert torch.equal(weight, before)
    block_scores(weight, blocks, torch.tensor(len(gradients)))
    compensate_blocks(weight, torch.rand(6, 10) < 0.5, blocks)
    assert torch.equal(blocks, sums)


def regression(seed: int) -> tuple[nn.Sequential, Callable[[Tensor | slice], Tensor], int]:
    """A trained network with far more weights than it needs: 32 inputs that follow from 6 causes."""
    torch.manual_seed(seed)
    rows = 512
    inputs = torch.randn(rows, 6) @ torch.randn(6, 32) / 6**0.5 + 0.3 * torch.randn(rows, 32)
    inputs = inputs * torch.logspace(-0.7, 0.7, 32)[torch.randperm(32)]
    outputs = torch.sin(inputs @ torch.randn(32, 4) / 5)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4))

    def loss(chosen: Tensor | slice) -> Tensor:
        return nn.functional.mse_loss(model(inputs[chosen]), outputs[chosen])

    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(40):
        for chosen in torch.randperm(rows).split(32):
            optimizer.zero_grad()
            loss(chosen).backward()
            optimizer.step()
    return model, loss, rows


@pytest.mark.parametrize("seed", [0, 1])
def test_what_gradients_tell_hurts_a_trained_network_less_than_chance(seed: int) -> None:
    model, loss, rows = regression(seed)
    parameters = [model[0].weight, model[2].weight]
    trained = [parameter.detach().clone() for parameter in parameters]
    names = ["random", "first_order", "fisher", "block_fisher"]
    criteria = [get_criterion(name) for name in names]
    states = [[criterion.new_state(parameter) for parameter in parameters] for criterion in criteria]
    for _ in range(100):
        model.zero_grad()
        loss(torch.randint(rows, (16,))).backward()
        for criterion, own in zip(criteria, states, strict=True):
            for parameter, state in zip(parameters, own, strict=True):
                criterion.accumulate(parameter, parameter.grad, state)  # type: ignore[arg-type]

    def loss_after(criterion: Criterion, own: list[dict[str, Tensor]], compensated: bool) -> float:
        generator = torch.Generator().manual_seed(seed)
        found = [criterion.score(weight, state, generator) for weight, state in zip(trained, own, strict=True)]
        together = torch.cat([score.flatten() for score in found])
        threshold = together.kthvalue(int(0.6 * len(together))).values
        with torch.no_grad():
            for parameter, weight, score, state in zip(parameters, trained, found, own, strict=True):
                parameter.copy_(weight)
                if compensated:
                    criterion.compensate(parameter, score <= threshold, state)
                parameter.mul_(score > threshold)
            assert float(sum((one == 0).sum() for one in parameters)) == int(0.6 * len(together))
            return float(loss(slice(None)))

    after = {
        name: loss_after(criterion, own, compensated=False)
        for name, criterion, own in zip(names, criteria, states, strict=True)
    }
    compensated = loss_after(criteria[-1], states[-1], compensated=True)
    assert after["first_order"] < 0.8 * after["random"]
    assert after["fisher"] < 0.6 * after["random"]
    assert after["block_fisher"] < after["fisher"]
    assert compensated < 0.8 * after["fisher"]
    assert compensated < 0.8 * after["block_fisher"]
