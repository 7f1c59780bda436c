"""One float model under many schemes: what each costs, and what it buys, measured on the same examples."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from ..quantization.post_training import quantize
from ..runtime.base import quantized_modules
from ..schemes import Scheme, get_scheme
from ..texts import find_tokenizer, length_limit
from .compare import CONFIDENCE, check_numbers, check_roles, find_timed_length, load_given
from .labels import check_models_agree
from .latency import time_pair
from .measures import Bootstrap, Examples, Texts, examples
from .measures import texts as windows_of
from .predict import evaluating
from .provenance import describe_machine, describe_model, describe_versions, origin
from .sizes import model_size
from .statistics import check_bootstrap
from .sweep_report import Sweep
from .sweep_results import SchemeResult
from .tasks import GLUE_TASKS, Task

if TYPE_CHECKING:
    from datasets import Dataset

# A scheme, and other options of `quantize`, by the label of the row.
Variants = dict[str, tuple[Scheme, dict[str, Any]]]


def compare_schemes(
    model: PreTrainedModel | str | os.PathLike[str],
    schemes: Sequence[str | Scheme] | Mapping[str, Mapping[str, Any]],
    *,
    task: str | Task | None = None,
    data: Dataset | str | os.PathLike[str] | None = None,
    texts: Sequence[str] | str | None = None,
    calibration: Any = None,
    samples: int = 128,
    metrics: Sequence[str] | str | None = None,
    processing_class: Any = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    max_samples: int | None = None,
    latency_batch_size: int | None = 1,
    latency_length: int | None = None,
    resamples: int = 10_000,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Sweep:
    """Quantize a model with each of several schemes and hold every result against the float model.

    ```python
    print(compare_schemes("my/bert-mrpc", ["int8_dynamic", "int8_static", "int4_weight_only"], task="mrpc"))
    compare_schemes(llama, ["int8_dynamic"], texts=wikitext["text"], processing_class=tokenizer).save("report")
    compare_schemes(
        model,
        {"static": {"scheme": "int8_static"}, "equalized": {"scheme": "int8_static", "equalize": "smoothquant"}},
        task="mrpc",
    )
    ```

    The float model runs once; each quantized one sees the same batches, is timed in turn with the float model, and
    is freed before the next is made. A scheme that fails is reported with its reason, beside the others.

    Args:
        model (`PreTrainedModel` or `str`): a float model, its folder or hub id. It stays as it is.
        schemes (list of `str`, or `dict`):
            Names of schemes; or, by the label that the row shall have, a dictionary with `"scheme"` and any other
            options of [`quantize`].
        task (`str` or `Task`, *optional*): a GLUE task, or a `Task` for `data`; see [`compare`]. The first of the
            task's splits is measured.
        data (`datasets.Dataset` or `str`, *optional*): labelled examples, or a file of them; see [`compare`].
        texts (list of `str`, or `str`, *optional*): in place of a task, for causal language models: a text, or rows
            of a corpus, for the [`perplexity`] in windows that do not overlap.
        calibration (*optional*):
            What [`quantize_static`] takes, for static schemes and other options that need data. Texts for a causal
            language model are joined and cut into windows as `texts` are. Defaults to the train split of a task;
            there is no default for `data` and `texts`, as what is measured must not serve as calibration too.
        samples (`int`, *optional*, defaults to 128): examples or windows to calibrate on, drawn at random from a train
            split or a text, and the first ones of other data.
        metrics (list of `str`, *optional*): in place of the task's own; see `Task`.
        processing_class (tokenizer or `str`, *optional*): defaults to the one beside the model.
        batch_size (`int`, *optional*): a batch; 32 examples, or 4 windows.
        max_length (`int`, *optional*): tokens at which examples are cut, by default what the model can take; or
            tokens a window, 512 or what the model can take if less.
        max_samples (`int`, *optional*): examples or windows to draw at random; all of them by default.
        latency_batch_size (`int`, *optional*, defaults to 1): sequences a timed call; `None` times nothing.
        latency_length (`int`, *optional*): tokens a timed sequence; 128, or what the model can take if less.
        resamples (`int`, *optional*, defaults to 10000): of the bootstrap.
        seed (`int`, *optional*, defaults to 0): of the bootstrap, of drawn examples, and of the timed tokens.
        device (`torch.device` or `str`, *optional*): where all run; defaults to where the model is.
        progress (`bool`, *optional*, defaults to `True`): whether to show progress bars.

    Returns:
        [`Sweep`]: prints as a table; `to_json`, `to_markdown`, `to_html` with a picture, and `save` for all three.

    Raises:
        `ValueError`: if there is nothing to measure on, model and data do not fit together, a scheme is unknown,
            calibration data are missing, or every scheme fails.
    """
    variants = _variants(schemes)
    check_numbers(1 if batch_size is None else batch_size, max_samples, latency_batch_size, latency_length)
    check_bootstrap(resamples, CONFIDENCE)
    if (texts is None) is (task is None and data is None):
        raise ValueError(
            "Give one thing to measure on: `task=` (one of "
            f"{', '.join(GLUE_TASKS)}) or `data=` for a classifier, or `texts=` for a causal language model."
        )
    float_model = load_given(model)
    check_roles({"float": float_model, "int8": float_model})
    places = [origin(float_model) if isinstance(model, PreTrainedModel) else model]
    tokenizer = find_tokenizer(processing_class, places)
    shared: dict[str, Any] = {
        "max_length": max_length,
        "max_samples": max_samples,
        "batch_size": batch_size,
        "bootstrap": Bootstrap(resamples, seed),
        "progress": progress,
    }
    measure: Examples | Texts
    if texts is not None:
        measure = windows_of(float_model, tokenizer, texts, **shared)
    else:
        measure = examples(float_model, tokenizer, task, data, metrics=metrics, **shared)
    found, words = None, ""
    if calibration is not None or any(_needs_data(scheme, options) for scheme, options in variants.values()):
        found, words = measure.calibration(calibration, samples)
    length = find_timed_length(latency_length, length_limit(tokenizer, [float_model], None))

    rows: list[SchemeResult] = []
    failed: dict[str, str] = {}
    with evaluating([float_model], torch.device(device or float_model.device)):
        before = measure.measure("float", float_model)
        for label, (scheme, options) in variants.items():
            start = time.perf_counter()
            try:
                quantized = quantize(float_model, scheme, found, progress=progress, **options)
                seconds = time.perf_counter() - start
                rows.append(
                    _row(label, scheme.name, options, seconds, measure, before, float_model, quantized,
                         latency_batch_size, length)
                )  # fmt: skip
            except (ValueError, ImportError) as error:
                failed[label] = str(error)
            quantized = None
            gc.collect()  # modules hold each other in circles
        if not rows:
            raise ValueError("No scheme worked. " + " ".join(f"{label}: {why}" for label, why in failed.items()))
        return _sweep(measure, model, float_model, rows, failed, words)


def compare_perplexity(
    float_model: PreTrainedModel | str | os.PathLike[str],
    quantized_model: PreTrainedModel | str | os.PathLike[str],
    processing_class: Any,
    texts: Sequence[str] | str,
    *,
    length: int | None = None,
    batch_size: int | None = None,
    max_samples: int | None = None,
    latency_batch_size: int | None = 1,
    latency_length: int | None = None,
    resamples: int = 10_000,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Sweep:
    """Hold a quantized causal language model against the float one: perplexity with an interval, size, latency.

    ```python
    print(compare_perplexity("my/llama", "my-llama-int8", None, wikitext["text"]))
    ```

    Args:
        float_model (`PreTrainedModel` or `str`): the float model, its folder or hub id.
        quantized_model (`PreTrainedModel` or `str`): the same, quantized.
        processing_class (tokenizer, `str` or `None`): `None` for the one beside the models.
        texts (list of `str`, or `str`): a text, or rows of a corpus; see [`perplexity`].
        length (`int`, *optional*): tokens a window; 512, or what the models can take if less.
        batch_size, max_samples, latency_batch_size, latency_length, resamples, seed, device, progress (*optional*):
            see [`compare_schemes`].

    Returns:
        [`Sweep`]: of one row, `"quantized"`.

    Raises:
        `ValueError`: if the models are swapped or the same, or do not fit the text.
    """
    check_numbers(1 if batch_size is None else batch_size, max_samples, latency_batch_size, latency_length)
    check_bootstrap(resamples, CONFIDENCE)
    if float_model is quantized_model:
        raise ValueError("`float_model` and `quantized_model` are the same object, so nothing would differ.")
    pair = {"float": load_given(float_model), "int8": load_given(quantized_model)}
    check_roles(pair)
    check_models_agree(pair["float"].config, pair["int8"].config)
    given = [m for m in (float_model, quantized_model) if not isinstance(m, PreTrainedModel)]
    tokenizer = find_tokenizer(processing_class, [*given, *(origin(m) for m in pair.values())])
    measure = windows_of(
        pair["float"],
        tokenizer,
        texts,
        max_length=length,
        max_samples=max_samples,
        batch_size=batch_size,
        bootstrap=Bootstrap(resamples, seed),
        progress=progress,
    )
    tokens = find_timed_length(latency_length, length_limit(tokenizer, list(pair.values()), None))
    with evaluating(list(pair.values()), torch.device(device or pair["int8"].device)):
        before = measure.measure("float", pair["float"])
        row = _row("quantized", "", {}, None, measure, before, pair["float"], pair["int8"], latency_batch_size, tokens)
        return _sweep(measure, float_model, pair["float"], [row], {}, "")


def _row(
    label: str,
    scheme: str,
    options: Mapping[str, Any],
    seconds: float | None,
    measure: Examples | Texts,
    before: Any,
    float_model: PreTrainedModel,
    quantized: PreTrainedModel,
    latency_batch_size: int | None,
    length: int,
) -> SchemeResult:
    after: Any = measure.measure(label, quantized)
    changes, agreement, deviation = measure.judge(before, after)
    latency = None
    if latency_batch_size is not None:
        pair = {"float": float_model, "int8": quantized}
        seed, tokenizer = measure.bootstrap.seed, measure.tokenizer
        latency = time_pair(pair, latency_batch_size, length, tokenizer, measure.example, seed, measure.progress)
    return SchemeResult(
        label=label,
        scheme=scheme,
        options=", ".join(f"{name}={value!r}" for name, value in options.items()),
        layers=len(quantized_modules(quantized)),
        seconds=seconds,
        changes=changes,
        size=model_size(quantized),
        latency=latency,
        agreement=agreement,
        deviation=deviation,
    )


def _sweep(
    measure: Examples | Texts,
    given: PreTrainedModel | str | os.PathLike[str],
    float_model: PreTrainedModel,
    rows: Sequence[SchemeResult],
    failed: dict[str, str],
    calibration: str,
) -> Sweep:
    return Sweep(
        task=measure.name,
        headline=measure.headline,
        split=measure.split,
        samples=measure.samples,
        rows_in_split=measure.rows,
        tokens=measure.tokens,
        max_length=measure.max_length,
        float_model=describe_model(given, float_model),
        rows=tuple(rows),
        failed=failed,
        calibration=calibration,
        confidence=CONFIDENCE,
        resamples=measure.bootstrap.resamples,
        seed=measure.bootstrap.seed,
        machine=describe_machine(float_model.device),
        versions=describe_versions(),
    )


def _variants(schemes: Sequence[str | Scheme] | Mapping[str, Mapping[str, Any]]) -> Variants:
    """Label, scheme and other options of each row.

    Raises:
        `ValueError`: if there is none, or a scheme is unknown or missing.
    """
    if isinstance(schemes, (str, Scheme)):
        schemes = [schemes]
    found: Variants = {}
    if isinstance(schemes, Mapping):
        for label, options in schemes.items():
            if "scheme" not in options:
                raise ValueError(f"`schemes`: {label!r} has no 'scheme' among its options: {', '.join(options)}.")
            rest = {name: value for name, value in options.items() if name != "scheme"}
            found[label] = get_scheme(options["scheme"]), rest
    else:
        for name in schemes:
            scheme = get_scheme(name)
            found[scheme.name] = scheme, {}
    if not found:
        raise ValueError("`schemes` is empty. Name at least one, such as 'int8_dynamic'.")
    return found


def _needs_data(scheme: Scheme, options: Mapping[str, Any]) -> bool:
    """Whether a static range, or an option that looks at activations, is among them."""
    others = [get_scheme(own) for own in (options.get("overrides") or {}).values() if own is not None]
    static = any(own.activations == "static" for own in (scheme, *others))
    return static or options.get("rounding") == "gptq" or bool(options.get("equalize") or options.get("correct_bias"))
