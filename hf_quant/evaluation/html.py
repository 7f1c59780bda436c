"""A comparison as one HTML file: inline style and plots, light and dark, nothing fetched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from . import plots
from . import wording as w
from .results import Figures, SplitResult
from .text import size_rows

LOWEST_LAYERS = 20

_LIGHT = """
--page:#f6f5f2; --card:#ffffff; --ink:#1c1b19; --soft:#5f5d58; --line:#e4e2dc; --float:#8d8a83; --int8:#2a6fdb;
--embeddings:#2a6fdb; --linear:#12a181; --rest:#d99000; --good:#0b7f3f; --bad:#c62f2f; --even:#4a4843;
"""
_DARK = """
--page:#141413; --card:#1e1e1c; --ink:#f1efe9; --soft:#a9a69e; --line:#34332f; --float:#8d8a83; --int8:#5b98f2;
--embeddings:#5b98f2; --linear:#2bb897; --rest:#dca234; --good:#4cc07c; --bad:#f0706c; --even:#cfccc4;
"""
STYLE = """
.hfq { color-scheme:light dark; LIGHT background:var(--page); color:var(--ink);
  font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif; padding:32px 20px; }
@media (prefers-color-scheme:dark) { .hfq { DARK } }
.hfq main { max-width:840px; margin:0 auto; }
.hfq h1 { font-size:27px; line-height:1.2; margin:0 0 6px; letter-spacing:-.01em; }
.hfq h2 { font-size:17px; margin:0 0 2px; }
.hfq p { margin:4px 0; }
.hfq .soft, .hfq figcaption { color:var(--soft); font-size:13.5px; }
.hfq code { font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace; overflow-wrap:anywhere; }
.hfq .models { margin:12px 0 20px; display:grid; grid-template-columns:auto 1fr; gap:2px 12px; }
.hfq .models dt { color:var(--soft); }
.hfq .models dd { margin:0; }
.hfq .tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(180px,1fr)); gap:12px; margin:0 0 16px; }
.hfq .tile, .hfq section { background:var(--card); border:1px solid var(--line); border-radius:12px; }
.hfq .tile { padding:14px 16px; }
.hfq .tile b { display:block; font-size:21px; line-height:1.4; white-space:nowrap; letter-spacing:-.01em; }
.hfq .tile span { display:block; font-size:13px; color:var(--soft); }
.hfq section { padding:18px 20px 16px; margin:0 0 16px; overflow-x:auto; }
.hfq figure { margin:12px 0 8px; min-width:560px; }
.hfq svg { display:block; width:100%; height:auto; }
.hfq table { border-collapse:collapse; width:100%; margin:10px 0 6px; font-variant-numeric:tabular-nums; }
.hfq th { font-weight:500; color:var(--soft); font-size:13px; }
.hfq th, .hfq td { text-align:left; padding:6px 16px 6px 0; border-bottom:1px solid var(--line); white-space:nowrap; }
.hfq .n { text-align:right; }
.hfq tr:last-child td { border-bottom:0; }
.hfq tr.key td { font-weight:600; }
.hfq ul { margin:8px 0 0; padding-left:18px; }
.hfq .worse { color:var(--bad); } .hfq .better { color:var(--good); }
.hfq .legend { display:flex; flex-wrap:wrap; gap:4px 18px; }
.hfq .legend i { display:inline-block; width:10px; height:10px; border-radius:3px; margin-right:7px; }
.hfq summary { cursor:pointer; color:var(--soft); font-size:13.5px; padding:6px 0; }
.hfq svg text { font-size:13px; fill:var(--ink); }
.hfq svg .tick, .hfq svg .layer-value { fill:var(--soft); font-size:12px; }
.hfq svg .layer { font:11.5px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace; }
.hfq svg .value { font-variant-numeric:tabular-nums; }
.hfq svg .grid { stroke:var(--line); } .hfq svg .zero { stroke:var(--soft); }
.hfq svg .whisker { stroke:var(--even); stroke-width:2; stroke-linecap:round; }
.hfq svg circle { fill:var(--even); stroke:var(--card); stroke-width:2; }
.hfq svg .worse .whisker { stroke:var(--bad); } .hfq svg .worse circle { fill:var(--bad); }
.hfq svg .better .whisker { stroke:var(--good); } .hfq svg .better circle { fill:var(--good); }
.hfq svg .p95 { stroke:var(--soft); stroke-width:1.5; }
.hfq svg .embeddings { fill:var(--embeddings); } .hfq svg .linear { fill:var(--linear); }
.hfq svg .rest { fill:var(--rest); }
.hfq svg .float-model { fill:var(--float); } .hfq svg .int8-model { fill:var(--int8); }
""".replace("LIGHT", _LIGHT).replace("DARK", _DARK)


def document(comparison: Figures) -> str:
    """The whole page; well-formed as XML too."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{escape(comparison.task)}: float against quantized</title>"
        f"<style>body {{ margin:0; }} body .hfq {{ min-height:100vh; box-sizing:border-box; }}</style></head>\n"
        f"<body>{fragment(comparison)}</body></html>\n"
    )


def fragment(comparison: Figures) -> str:
    """The report as one element with its style, for a notebook."""
    sections = [_quality(comparison, split) for split in comparison.splits]
    sections += [_size(comparison), _latency(comparison), _layers(comparison)]
    sections.append(f"<section><h2>How it was measured</h2>{html_bullets(w.method(comparison))}</section>")
    models = "".join(
        f"<dt>{role}</dt><dd><code>{escape(model.name)}</code> "
        f'<span class="soft">{escape(w.model_words(model))}</span></dd>'
        for role, model in (("float", comparison.float_model), ("quantized", comparison.int8_model))
    )
    return (
        f'<div class="hfq"><style>{STYLE}</style><main>\n'
        f"<h1>{escape(comparison.task)}: float against quantized</h1>\n<p>{escape(w.headline(comparison))}</p>\n"
        f'<dl class="models">{models}</dl>\n{_tiles(comparison)}\n' + "\n".join(sections) + "\n</main></div>"
    )


def _tiles(comparison: Figures) -> str:
    split = comparison.splits[0]
    metric = next(m for m in split.metrics if m.name == comparison.headline)
    name = w.METRIC_NAMES.get(metric.name, metric.name)
    tiles = [
        (
            f"{w.signed_points(metric.delta, split.samples)} points",
            f"{name}, {w.interval(metric, split.samples)}",
            w.verdict(metric, comparison.confidence),
        ),
        (
            w.smaller(comparison),
            f"{w.megabytes(comparison.float_model.size.total)} MB to "
            f"{w.megabytes(comparison.int8_model.size.total)} MB",
            f"{comparison.int8_model.int8_layers} quantized layers",
        ),
    ]
    latency = comparison.latency
    if latency is not None:
        tiles.append(
            (
                w.faster(latency),
                f"{w.significant(latency.float_p50)} ms to {w.significant(latency.int8_p50)} ms, median",
                f"batch {latency.batch_size}, {latency.length} tokens",
            )
        )
    if split.agreement is not None:
        tiles.append(
            (
                f"{split.agreement.flip_rate * 100:.2g} % flipped",
                f"{split.agreement.flips} of {split.samples:,} predictions changed",
                f"McNemar {w.p_value(split.agreement.mcnemar_p)}",
            )
        )
    cells = "".join(
        f'<div class="tile"><b>{escape(big)}</b><span>{escape(small)}</span><span>{escape(smallest)}</span></div>'
        for big, small, smallest in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _quality(comparison: Figures, split: SplitResult) -> str:
    rows = []
    for metric in split.metrics:
        cells = (
            w.METRIC_NAMES.get(metric.name, metric.name),
            w.points(metric.float_value, split.samples),
            w.points(metric.int8_value, split.samples),
            w.signed_points(metric.delta, split.samples),
            w.interval(metric, split.samples),
        )
        verdict = escape(w.verdict(metric, comparison.confidence))
        row = f'{html_cells(cells, slice(1, 5))}<td class="{w.outcome(metric)}">{verdict}</td>'
        rows.append(html_row(row, key=metric.name == comparison.headline))
    header = ("points of 100", "float", "quantized", "delta", f"{w.percent(comparison.confidence)} interval", "")
    lines = w.readings(split, comparison.confidence)
    if split.agreement is not None:
        lines.insert(0, w.agreement_words(split.agreement, split.samples))
    elif split.deviation is not None:
        lines.insert(0, w.deviation_words(split))
    return (
        f'<section><h2>Quality on {escape(split.split)}</h2><p class="soft">'
        f"{w.sample_count(split, comparison.seed)}. The line is the {w.percent(comparison.confidence)} interval of "
        "the change; where it crosses zero, no difference was seen.</p>"
        f"<figure>{plots.delta_plot([split], comparison.confidence)}</figure>"
        f"{html_table(header, rows, slice(1, 5))}{html_bullets(lines)}</section>"
    )


def _size(comparison: Figures) -> str:
    rows = [
        html_row(html_cells((name, w.megabytes(a), w.megabytes(b), w.ratio(a, b)), slice(1, 4)), key=name == "total")
        for name, a, b in size_rows(comparison)
    ]
    legend = "".join(f'<span><i style="background:var(--{kind})"></i>{kind}</span>' for kind in plots.KINDS)
    return (
        f"<section><h2>Size: {w.smaller(comparison)}</h2>"
        f"<figure>{plots.size_plot(comparison.float_model.size, comparison.int8_model.size)}"
        f'<figcaption class="legend">{legend}</figcaption></figure>'
        f"{html_table(('MB', 'float', 'quantized', 'float / quantized'), rows, slice(1, 4))}</section>"
    )


def _latency(comparison: Figures) -> str:
    latency = comparison.latency
    if latency is None:
        return ""
    return (
        f'<section><h2>Latency: {w.faster(latency)}</h2><p class="soft">'
        f"{escape(w.latency_conditions(latency).capitalize())}. Bars end at the median, lines at the 95th "
        f"percentile.</p><figure>{plots.latency_plot(latency)}</figure></section>"
    )


def _layers(comparison: Figures) -> str:
    layers = list(comparison.layer_sqnr.items())
    if not layers:
        return ""
    lowest = sorted(layers, key=lambda item: item[1])[:LOWEST_LAYERS]
    intro = (
        "All quantized layers" if len(layers) == len(lowest) else f"{len(lowest)} of {len(layers)} quantized layers"
    )
    rows = [
        html_row(f"<td><code>{escape(n)}</code></td>{html_cells((w.decibels(v),), slice(0, 1))}") for n, v in layers
    ]
    return (
        f'<section><h2>Error by layer</h2><p class="soft">{intro}, least exact first. Signal over quantization noise '
        "of each layer's output, in decibels; higher is closer to float.</p>"
        f"<figure>{plots.sqnr_plot(lowest)}</figure><details><summary>All {len(layers)} layers in the order of the "
        f"model</summary>{html_table(('layer', 'SQNR, dB'), rows, slice(1, 2))}</details></section>"
    )


def html_table(header: Sequence[str], rows: Iterable[str], numbers: slice) -> str:
    """A table; `numbers` are the columns set to the right."""
    head = html_cells(header, numbers, "th")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def html_row(cells: str, key: bool = False) -> str:
    """A row; `key` sets it in bold."""
    return f'<tr class="key">{cells}</tr>' if key else f"<tr>{cells}</tr>"


def html_cells(values: Sequence[str], numbers: slice, tag: str = "td") -> str:
    """The cells of a row, escaped."""
    right = set(range(len(values))[numbers])
    kinds = [' class="n"' if i in right else "" for i in range(len(values))]
    return "".join(f"<{tag}{kind}>{escape(value)}</{tag}>" for kind, value in zip(kinds, values, strict=True))


def html_bullets(lines: Iterable[str]) -> str:
    """A list, escaped."""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"
