"""The table and the plot of `benchmarks/inference.py`, from its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import PEERS


def best_other(rows: dict[str, dict[str, float]]) -> str | None:
    """The fastest peer of a case that is not ours."""
    others = [name for name in rows if PEERS[name].kind == "peer"]
    return min(others, key=lambda name: rows[name]["median_ms"], default=None)


def write_table(path: Path, results: dict[str, Any]) -> None:
    """Write a Markdown page: a table a case, then what each peer takes to start and to hold, then what failed."""
    machine, versions = results["machine"], results["versions"]
    lines = [
        f"# Inference: {results['shape']}, {machine['threads']} threads",
        "",
        f"{machine['cpu']} ({', '.join(machine['cpu_flags'])}). "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
        "",
        "Peers take turns, each in a process of its own. Times are medians with quartiles; the last two columns are "
        "medians of the ratios within a round. The bare products are the model's int8 products alone, on all "
        "positions, or without padding where there is some.",
    ]
    for case, result in results["cases"].items():
        lines += [
            "",
            f"## {case}: {result['sentences']} sentences in {result['batches']} batches, "
            f"{result['tokens']:,} tokens of {result['positions']:,} positions, {result['rounds']} rounds",
            "",
            "| peer | ms | quartiles | sentences/s | of the best other | x the bare products |",
            "|---|---|---|---|---|---|",
        ]
        rows = result["rows"]
        for name in sorted(rows, key=lambda name: rows[name]["median_ms"]):
            row = rows[name]
            lines.append(
                f"| {_label(name)} | {row['median_ms']:.2f} | {row['q1_ms']:.2f}, {row['q3_ms']:.2f} "
                f"| {row['sentences_per_s']:,.1f} | {_number(row.get('of_best_other'))} "
                f"| {_number(row.get('of_products'))} |"
            )
    lines += [
        "",
        "## Start, memory, agreement",
        "",
        "From the start of the process to its first answer, imports and compilation included (again: with Inductor's "
        "cache of an earlier run). Resident memory after the first answer, and after all cases, when compiled peers "
        "hold a program for each shape. Predictions equal to PyTorch float32's, and the signal-to-noise ratio of the "
        "logits, on the real texts.",
        "",
        "| peer | first answer, s | MB | MB at the end | same predictions | dB |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in results["peers"].items():
        if "failed" not in row:
            again = " (again)" if row["compiled_before"] and "compiled" in PEERS[name].label else ""
            same = "" if "agreement" not in row else f"{row['agreement']:.1%} of {row['compared']}"
            decibels = "" if row.get("sqnr_db") is None else f"{row['sqnr_db']:.1f}"
            lines.append(
                f"| {_label(name)} | {row['first_answer_s']:.1f}{again} | {row['memory_mb']:.0f} "
                f"| {row.get('memory_end_mb', row['memory_mb']):.0f} | {same} | {decibels} |"
            )
    failed = {name: row["failed"] for name, row in results["peers"].items() if "failed" in row}
    if failed:
        lines += ["", "## Not measured", ""]
        lines += [f"- {PEERS[name].label}: {reason}" for name, reason in failed.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def plot(path: Path, results: dict[str, Any]) -> None:
    """Write bars of throughput relative to the best peer that is not ours, a panel a case, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "hf_quant"
    from matplotlib import pyplot

    cases = {name: case for name, case in results["cases"].items() if best_other(case["rows"])}
    if not cases:
        return
    names = [name for name in PEERS if any(name in case["rows"] for case in cases.values())]
    names = [name for name in names if PEERS[name].kind != "products"][::-1]
    figure, panels = pyplot.subplots(
        1, len(cases), sharey=True, squeeze=False, figsize=(2.2 + 2.4 * len(cases), 0.8 + 0.3 * len(names))
    )
    most = max(row.get("of_best_other", 0.0) for case in cases.values() for row in case["rows"].values())
    for panel, (case, result) in zip(panels[0], cases.items(), strict=True):
        values = [result["rows"].get(name, {}).get("of_best_other", 0.0) for name in names]
        colours = ["#1f6fb4" if PEERS[name].kind == "ours" else "#b9bec4" for name in names]
        bars = panel.barh([PEERS[name].label for name in names], values, color=colours)
        panel.bar_label(bars, [f"{value:.2f}" if value else "" for value in values], padding=2, fontsize=7)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_xlim(0, 1.18 * most)
        panel.set_title(case, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{results['shape']}, {results['machine']['threads']} threads: throughput, best other peer = 1", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _label(name: str) -> str:
    label = PEERS[name].label
    return f"**{label}**" if PEERS[name].kind == "ours" else label


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
