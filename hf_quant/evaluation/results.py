"""What a comparison found, as plain values. Importing this module does not import torch."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Interval:
    """A percentile interval.

    Args:
        low (`float`): its lower end.
        high (`float`): its upper end.
        undefined (`int`, *optional*, defaults to 0):
            Resamples in which the metric had no value, such as a correlation with a constant; they are left out.
    """

    low: float
    high: float
    undefined: int = 0


@dataclass(frozen=True)
class MetricResult:
    """One metric of both models on the same examples, as fractions (0.8946).

    Args:
        name (`str`): the metric.
        float_value (`float`): of the float model; `nan` where it is undefined.
        int8_value (`float`): of the quantized model.
        interval ([`Interval`]): of `int8_value - float_value`, from the paired bootstrap.
    """

    name: str
    float_value: float
    int8_value: float
    interval: Interval

    @property
    def delta(self) -> float:
        """Quantized minus float: negative where quantization cost quality."""
        return self.int8_value - self.float_value


@dataclass(frozen=True)
class Agreement:
    """How two classifiers differ, example by example.

    Args:
        flips (`int`): examples whose predicted class changed, right or wrong.
        flip_rate (`float`): their share, in [0, 1]. It sees changes that cancel out in the accuracy (Dutta et
            al., 2024, "Accuracy is Not All You Need").
        wins (`int`): examples that only the quantized model gets right.
        losses (`int`): examples that only the float model gets right.
        mcnemar_p (`float`): two-sided p of the exact McNemar test of `wins` against `losses`.
    """

    flips: int
    flip_rate: float
    wins: int
    losses: int
    mcnemar_p: float


@dataclass(frozen=True)
class Deviation:
    """How the predictions of two regression models differ, in the unit of the labels.

    Args:
        mean_absolute (`float`): mean of |int8 - float| over the examples.
        max_absolute (`float`): the largest.
    """

    mean_absolute: float
    max_absolute: float


@dataclass(frozen=True)
class SplitResult:
    """Both models on one labelled split.

    Args:
        split (`str`): its name.
        samples (`int`): examples judged.
        rows (`int`): examples that the split has.
        metrics (`tuple[MetricResult, ...]`): in the order of the task.
        agreement ([`Agreement`], *optional*): for classifiers; of sentences for tags, of questions for answers.
        deviation ([`Deviation`], *optional*): for regression.
    """

    split: str
    samples: int
    rows: int
    metrics: tuple[MetricResult, ...]
    agreement: Agreement | None = None
    deviation: Deviation | None = None


@dataclass(frozen=True)
class ModelSize:
    """Bytes of a model's state: weights, biases, scales and every other persistent buffer.

    A tensor that several modules share (tied embeddings) counts once, with the embeddings.

    Args:
        embeddings (`int`): bytes in float and int8 embedding layers.
        linear (`int`): bytes in float and int8 linear layers, transformers' `Conv1D` included.
        rest (`int`): bytes in all other modules.
        on_disk (`int`, *optional*): bytes of the weight files, where the model came from a local folder.
    """

    embeddings: int
    linear: int
    rest: int
    on_disk: int | None = None

    @property
    def total(self) -> int:
        """Bytes of the whole state."""
        return self.embeddings + self.linear + self.rest


@dataclass(frozen=True)
class Latency:
    """Forward passes timed one by one, float and int8 in turn, so that a busy machine slows both.

    Args:
        batch_size (`int`): sequences a call.
        length (`int`): tokens a sequence, none of them padding.
        threads (`int`): of torch, within one operation.
        calls (`int`): timed calls of each model.
        float_p50 (`float`): median of the float model, in milliseconds.
        float_p95 (`float`): its 95th percentile.
        int8_p50 (`float`): median of the quantized model, in milliseconds.
        int8_p95 (`float`): its 95th percentile.
        speedup (`float`): median over the pairs of calls of float time / int8 time; above 1 int8 is faster.
    """

    batch_size: int
    length: int
    threads: int
    calls: int
    float_p50: float
    float_p95: float
    int8_p50: float
    int8_p95: float
    speedup: float


@dataclass(frozen=True)
class ModelInfo:
    """Which model, and how large.

    Args:
        name (`str`): folder or hub id, or the class where a model in memory has neither.
        architecture (`str`): its class.
        dtype (`str`): of its floating-point weights, such as `"float32"`.
        int8_layers (`int`): layers that hold int8 weights.
        size ([`ModelSize`]): its bytes by kind.
    """

    name: str
    architecture: str
    dtype: str
    int8_layers: int
    size: ModelSize


@dataclass(frozen=True)
class Machine:
    """Where it was measured.

    Args:
        cpu (`str`): the processor's model.
        device (`str`): where both models ran, with its name where it is not the CPU.
        threads (`int`): of torch, within one operation.
    """

    cpu: str
    device: str
    threads: int


@dataclass(frozen=True)
class Figures:
    """All that a comparison found, for the renderings of [`Comparison`].

    Args:
        task (`str`): the task's name.
        problem_type (`str`): of the [`Task`].
        headline (`str`): the metric to quote.
        float_model ([`ModelInfo`]): the float model.
        int8_model ([`ModelInfo`]): the quantized one.
        splits (`tuple[SplitResult, ...]`): metrics and agreement, one entry a labelled split.
        confidence (`float`): of the intervals, such as 0.95.
        resamples (`int`): of the bootstrap.
        seed (`int`): of the bootstrap, of drawn examples and of the timed tokens.
        max_length (`int`, *optional*): tokens at which texts were cut.
        latency ([`Latency`], *optional*): absent where nothing was timed.
        layer_sqnr (`dict[str, float]`): decibels by name for each int8 layer, in the order of the model.
        machine ([`Machine`]): where it was measured.
        versions (`dict[str, str]`): of hf_quant, torch, transformers and Python.
    """

    task: str
    problem_type: str
    headline: str
    float_model: ModelInfo
    int8_model: ModelInfo
    splits: tuple[SplitResult, ...]
    confidence: float
    resamples: int
    seed: int
    max_length: int | None
    latency: Latency | None
    layer_sqnr: dict[str, float]
    machine: Machine
    versions: dict[str, str]


def encode(value: Any) -> Any:
    """Plain JSON values of a result; numbers that JSON lacks become `"nan"`, `"inf"` and `"-inf"`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def decode(kind: Any, value: Any, where: str = "report") -> Any:
    """The inverse of `encode` for an annotated type.

    Raises:
        `ValueError`: where the value does not have that type, naming the place.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else decode(arguments[0], value, where)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        fields, hints = dataclasses.fields(kind), typing.get_type_hints(kind)
        names = {field.name for field in fields}
        if not isinstance(value, dict) or set(value) != names:
            raise ValueError(f"{where}: expected the fields {', '.join(sorted(names))}; got {value!r:.200}.")
        return kind(**{name: decode(hints[name], value[name], f"{where}.{name}") for name in value})
    if origin is tuple and isinstance(value, list):
        return tuple(decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: decode(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and (type(value) in (int, float) or value in ("nan", "inf", "-inf")):
        return float(value)
    if kind in (int, str) and type(value) is kind:
        return value
    raise ValueError(f"{where}: expected {getattr(kind, '__name__', kind)}, got {value!r:.200}.")
