"""Quantization inside the Hugging Face Trainer: small, fast, measured int8 models.

Everything public is imported on first use, so `import hf_quant` (and `hf-quant --help`) does not pay for
torch and transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .callbacks.distillation import DistillationCallback
    from .callbacks.pruning import PruningCallback
    from .callbacks.qat import QATCallback
    from .checkpoint import load_quantized, save_quantized
    from .evaluation.compare import compare
    from .evaluation.evaluator import task_evaluator
    from .evaluation.perplexity import perplexity
    from .evaluation.sweep import compare_perplexity, compare_schemes
    from .pruning.vocabulary import shrink_vocabulary
    from .quantization.calibration import Calibration
    from .quantization.guard import AccuracyError, meet_accuracy
    from .quantization.post_training import quantize, quantize_dynamic, quantize_static
    from .recipe.schema import Recipe
    from .runtime.optimize import optimize
    from .runtime.sparse import use_semi_structured

_HOME_OF = {
    "DistillationCallback": ".callbacks.distillation",
    "PruningCallback": ".callbacks.pruning",
    "QATCallback": ".callbacks.qat",
    "Calibration": ".quantization.calibration",
    "Recipe": ".recipe.schema",
    "compare": ".evaluation.compare",
    "compare_perplexity": ".evaluation.sweep",
    "compare_schemes": ".evaluation.sweep",
    "load_quantized": ".checkpoint",
    "AccuracyError": ".quantization.guard",
    "meet_accuracy": ".quantization.guard",
    "quantize": ".quantization.post_training",
    "quantize_dynamic": ".quantization.post_training",
    "quantize_static": ".quantization.post_training",
    "optimize": ".runtime.optimize",
    "perplexity": ".evaluation.perplexity",
    "save_quantized": ".checkpoint",
    "shrink_vocabulary": ".pruning.vocabulary",
    "task_evaluator": ".evaluation.evaluator",
    "use_semi_structured": ".runtime.sparse",
}

__all__ = [  # noqa: RUF022 - in the order in which a user meets them
    "QATCallback",
    "PruningCallback",
    "DistillationCallback",
    "shrink_vocabulary",
    "use_semi_structured",
    "quantize_dynamic",
    "quantize_static",
    "quantize",
    "Calibration",
    "meet_accuracy",
    "AccuracyError",
    "save_quantized",
    "load_quantized",
    "optimize",
    "compare",
    "compare_schemes",
    "compare_perplexity",
    "perplexity",
    "task_evaluator",
    "Recipe",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(_HOME_OF[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has: {', '.join(sorted(__all__))}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
