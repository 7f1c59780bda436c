"""What a sweep over schemes found, as plain values. Importing this module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from .results import Agreement, Deviation, Interval, Latency, Machine, ModelInfo, ModelSize

PERPLEXITY = "perplexity"


@dataclass(frozen=True)
class Change:
    """One metric of the float and a quantized model on the same examples or windows.

    Args:
        metric (`str`): its name.
        float_value (`float`): of the float model: a fraction (0.8946), or a perplexity.
        value (`float`): of the quantized model.
        change (`float`): `value - float_value`; for a perplexity `value / float_value - 1`.
        interval ([`Interval`]): of `change`, from the paired bootstrap.
    """

    metric: str
    float_value: float
    value: float
    change: float
    interval: Interval


@dataclass(frozen=True)
class SchemeResult:
    """One quantized model held against the float one.

    Args:
        label (`str`): what the row is called; the scheme's name unless another was given.
        scheme (`str`): the scheme; empty where a ready model was given.
        options (`str`): other options of [`quantize`], such as `"equalize='smoothquant'"`.
        layers (`int`): quantized layers.
        seconds (`float`, *optional*): that quantizing took, with calibration.
        changes (`tuple[Change, ...]`): the metrics in the order of the task.
        size ([`ModelSize`]): bytes by kind of layer.
        latency ([`Latency`], *optional*): absent where nothing was timed.
        agreement ([`Agreement`], *optional*): for classifiers.
        deviation ([`Deviation`], *optional*): for regression.
    """

    label: str
    scheme: str
    options: str
    layers: int
    seconds: float | None
    changes: tuple[Change, ...]
    size: ModelSize
    latency: Latency | None = None
    agreement: Agreement | None = None
    deviation: Deviation | None = None


@dataclass(frozen=True)
class SweepFigures:
    """All that a sweep found, for the renderings of [`Sweep`].

    Args:
        task (`str`): the task's name, or `"perplexity"`.
        headline (`str`): the metric to quote.
        split (`str`): of the data.
        samples (`int`): examples, or windows of text, that were judged.
        rows_in_split (`int`): that there were to draw from.
        tokens (`int`, *optional*): predicted tokens, of a perplexity.
        max_length (`int`, *optional*): tokens at which texts were cut, or tokens a window.
        float_model ([`ModelInfo`]): the float model.
        rows (`tuple[SchemeResult, ...]`): in the order in which they were asked for.
        failed (`dict[str, str]`): by label: why a model could not be made or measured.
        calibration (`str`): what static ranges were found on; empty where no data were used.
        confidence (`float`): of the intervals.
        resamples (`int`): of the bootstrap.
        seed (`int`): of the bootstrap, of drawn examples and of the timed tokens.
        machine ([`Machine`]): where it was measured.
        versions (`dict[str, str]`): of hf_quant, torch, transformers and Python.
    """

    task: str
    headline: str
    split: str
    samples: int
    rows_in_split: int
    tokens: int | None
    max_length: int | None
    float_model: ModelInfo
    rows: tuple[SchemeResult, ...]
    failed: dict[str, str]
    calibration: str
    confidence: float
    resamples: int
    seed: int
    machine: Machine
    versions: dict[str, str]
