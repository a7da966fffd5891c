"""What was measured, for people: Markdown tables that are aligned in a terminal too, and their place in README.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from works import WORKS, Work

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def sweep_table(work: Work, rows: list[dict[str, Any]]) -> str:
    body = [(row["system"], row["label"], f"{row['seconds']:.2f} s", mb(row["peak_mb"])) for row in rows]
    return f"\n**{work.name}**: micro-batches\n\n" + table([("system", "micro-batch", "fastest step", "peak above imports"), *body])


def step_table(work: Work, result: dict[str, Any]) -> str:
    """One model's comparison, to be read by people."""

    def column(name: str, micro: str) -> list[str]:
        shares = " / ".join(f"{100 * result[f'{name}_{part}_frac']:.0f} %" for part in ("rollout", "train", "rest"))
        tokens = f"{result[f'{name}_tokens']:.0f} ({result[f'{name}_tokens_per_completion']:.1f} a completion)"
        return [f"{result[f'{name}_s']:.2f} s", micro, shares, tokens, mb(result[f"{name}_rss_mb"])]

    whole = result["keel_micro_batch_tokens"]
    keel = column("keel", "whole batch" if whole is None else f"{whole} tokens")
    trl = column("trl", f"{result['trl_micro_batch_rows']} completions")
    equal, low, high = result["equal"], min(result["ratios"]), max(result["ratios"])
    names = ["step (median)", "micro-batch", "rollout / training / rest", "tokens sampled", "peak above imports"]
    names.append("peak, equal micro-batch")
    keel.append(f"{mb(equal['keel_rss_mb'])} ({equal['keel_micro_batch_tokens']} tokens)")
    trl.append(f"{mb(equal['trl_rss_mb'])} ({equal['trl_micro_batch_rows']} completions)")
    ratios = [f"{result['ratio']:.2f} × ({low:.2f}–{high:.2f}, {result['pairs']} pairs)", "", ""]
    ratios += [f"{result['ratio_per_token']:.2f} × per token", share(result["rss_ratio"]), share(equal["rss_ratio"])]
    title = f"\n**{work.name}**: {work.prompts} × {work.group_size} completions of at most {work.cap} tokens, one update\n\n"
    return title + table([("", "keel", "TRL", "ratio"), *zip(names, keel, trl, ratios, strict=True)])


def head_table(result: dict[str, Any]) -> str:
    rows = [("tokens", "full logits", "keel", "full / keel")]
    for tokens, row in result["tokens"].items():
        rows.append((tokens, mb(row["full_mb"]), mb(row["keel_mb"]), f"{row['ratio']:.1f} ×" if "ratio" in row else ""))
    return f"\n**Peak memory of log-probabilities**, forward and backward, vocabulary {result['vocabulary']}\n\n" + table(rows)


def table(rows: list[tuple[str, ...]]) -> str:
    """A Markdown table that is aligned in a terminal too."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def mb(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.0f} MB"


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} of TRL's"


def write_measured(readme: Path, results: dict[str, Any]) -> None:
    """Put the tables, each with its date, command and machine, between the two marks in README.md."""
    parts = [step_table(WORKS[name], row) + _made_by(row) for name, row in results["step_vs_trl"].items()]
    if "head_memory" in results:
        parts.append(head_table(results["head_memory"]) + _made_by(results["head_memory"]))
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n" + "\n".join(parts) + f"\n{END}{after}")


def _made_by(row: dict[str, Any]) -> str:
    machine, versions = row["machine"], ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    where = f"{machine['processor']}, {machine['threads']} threads, Python {machine['python']}, {versions}"
    return f"\n\n{row['when'][:10]}, revision {row['revision']}, `{row['command']}`: {where}.\n"
