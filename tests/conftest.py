"""What every test runs under: no network, no reporters, one thread, and a clean slate of random numbers."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

# Before transformers or torch is imported anywhere.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TRANSFORMERS_VERBOSITY="error",
    TOKENIZERS_PARALLELISM="false",
    HF_QUANT_CACHE="off",  # kernels are measured anew; nothing is read from, or written to, the machine
    TORCHINDUCTOR_COMPILE_THREADS="1",  # in the process itself, without helpers that each import torch first
)

import pytest
import torch
from hypothesis import HealthCheck, settings

# Examples differ in how long torch takes to warm up, which says nothing of the code under test; and a failure
# that only one run in ten sees helps nobody.
settings.register_profile("hf_quant", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("hf_quant")


@pytest.fixture(scope="session", autouse=True)
def _freeze_imports() -> None:
    """Every Trainer collects garbage when it starts; without the million objects of imports that is instant."""
    import transformers.trainer  # noqa: F401 - the largest of them

    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What captures graphs comes last: with all that Dynamo keeps, tests after it took several times as long."""
    items.sort(key=lambda item: item.path.name.startswith("test_optimize"))


# Tiny tensors: more threads only cost, and results must not hang on the machine. Here, not in a fixture: fixtures of
# modules come before those of tests.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def one_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Products of optimized models by one of torch's kernels, whatever is fastest here; graphs are dropped then."""
    from hf_quant.runtime import choice, products, vnni

    monkeypatch.setattr(vnni, "available", lambda: False)
    kernel = products.exact_kernels()[0]
    monkeypatch.setattr(choice, "choose", lambda *_: kernel)
    yield
    torch._dynamo.reset()
