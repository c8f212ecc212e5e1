"""A run as one HTML file that can be mailed: tables, plots, sample rollouts with their regions and weights.

Self-contained (pictures are inside, nothing is fetched, no script) and written whole or not at all.  Every number comes
from the files of the run, as in the text report; what a policy wrote is escaped, never markup.
"""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rest.analysis.before_after import Answer, read_compared
from megatron_rest.analysis.samples import REGION_WORDS, SampleRollout, SampleToken, read_samples
from megatron_rest.analysis.sections import explained_lines, text_sections
from megatron_rest.analysis.series import RunMetrics
from megatron_rest.analysis.summary import TableLine, duration
from megatron_rest.token_region import TokenRegion

__all__ = ["PAGE_FILE", "write_page"]

PAGE_FILE = "report.html"
_COLOURS = {  # the regions' colours of the plots
    TokenRegion.FORMAT: "0,114,178",
    TokenRegion.TOOL_NAME: "213,94,0",
    TokenRegion.TOOL_ARGS: "230,159,0",
    TokenRegion.THINK: "0,158,115",
    TokenRegion.RESPONSE: "204,121,167",
}
_FIRST = "reward"  # the picture above everything
_PROMPT_END = 600  # characters of a prompt that are shown: the question, and the last tools
_TITLES = {
    "reward": "Reward",
    "entropy": "Entropy by region",
    "weight_mass": "Weight mass by region",
    "phases": "Where the time went",
    "mismatch": "Rollout engine against trainer",
    "mismatch_by_region": "Rollout engine against trainer, by region",
    "variance_ratio": "Variance of the policy gradient, ratio to uniform weights",
    "validation": "Validation",
    "response_length": "Response length",
    "optimizer": "Updates",
}


def write_page(run: RunMetrics, pictures: Sequence[Path], output: str | Path, *, tokenizer: Any = None) -> Path:
    """Write the page of ``run`` to ``output``.

    Args:
        run: its metrics.
        pictures: the PNG files of :func:`megatron_rest.analysis.plots.plot_runs`.
        output: the file.
        tokenizer: of the policy, with ``get_vocab``; None leaves the sample rollouts out, and the page says so.
    """
    path = Path(output)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("\n".join(_page(run, pictures, tokenizer)) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def _page(run: RunMetrics, pictures: Sequence[Path], tokenizer: Any) -> Iterator[str]:
    title = f"megatron_rest: {run.label}"
    yield f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<style>{_STYLE}</style></head><body><main>"
    seconds = float(np.nansum(run.series("total", part="seconds")[1]))
    yield f"<h1>{html.escape(run.label)}</h1>"
    yield f"<p>Steps {run.steps[0]} to {run.steps[-1]}, {len(run.rows)} in all, {duration(seconds)}.</p>"
    first = [picture for picture in pictures if picture.stem == _FIRST]
    for picture in first:
        yield from _section(_TITLES[_FIRST], _image(picture))
    for heading, lines in text_sections(run):
        yield from _section(heading, _text(lines))
    for picture in pictures:
        if picture not in first:
            yield from _section(_TITLES.get(picture.stem, picture.stem), _image(picture))
    for compared in read_compared(run.run_dir):
        pairs = "\n".join(_pair(e.prompt, e.before, e.after) for e in compared.examples)
        yield from _section(f"The same prompts before and after: {compared.name}", f"{_legend()}\n{pairs}")
    yield from _section("Sample rollouts", "\n".join(_samples(run.run_dir, tokenizer)))
    yield from _section("Every number of this run", _text(explained_lines(run)))
    yield "</main></body></html>"


def _section(title: str, body: str) -> Iterator[str]:
    yield f"<section><h2>{html.escape(title)}</h2>\n{body}\n</section>"


def _text(lines: Sequence[str]) -> str:
    """Lines of a table as a table, all else as it is."""
    parts = []
    for is_table, some in groupby(lines, key=lambda line: isinstance(line, TableLine)):
        if is_table:
            rows = "\n".join(_row(line) for line in some if isinstance(line, TableLine) and not line.is_rule)
            parts.append(f'<table class="numbers">\n{rows}\n</table>')
        else:
            text = "\n".join(some).strip("\n")
            parts += [f"<pre>{html.escape(text)}</pre>"] if text else []
    return "\n".join(parts)


def _row(line: TableLine) -> str:
    """Cells with the line's own blanks between them, which no browser shows and whoever copies the text gets."""
    tag = "th" if line.is_header else "td"
    cells, position = "", 0
    for cell in line.cells:
        start = line.index(cell, position) if cell else position
        cells += f"{line[position:start]}<{tag}>{html.escape(cell)}</{tag}>"
        position = start + len(cell)
    return f"<tr>{cells}</tr>"


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">'


def _samples(run_dir: Path, tokenizer: Any) -> Iterator[str]:
    """Best and worst rollout of the first and the last saved step."""
    if tokenizer is None:
        yield "<p>Not shown: the policy's tokenizer was not found (give <code>--tokenizer FOLDER</code>).</p>"
        return
    samples = read_samples(run_dir, tokenizer)
    if not samples:
        yield "<p>The run has saved none.</p>"
        return
    yield f"{_legend()}<p>Stronger colour, larger weight; point at a token for its numbers.</p>"
    yield from map(_rollout, samples)


def _legend() -> str:
    words = [f'<span style="background:rgba({_COLOURS[r]},.45)">{name}</span>' for r, name in REGION_WORDS.items()]
    return f'<p class="legend">{" ".join(words)}</p>'


def _pair(prompt: str, before: Answer, after: Answer) -> str:
    """Two answers side by side under the end of their prompt."""
    sides = "".join(
        f"<td><b>{name}</b>, reward {answer.reward:.2f}, accuracy {answer.accuracy:.2f}"
        f'<div class="rollout">{"".join(_run(*run) for run in answer.regions)}</div></td>'
        for name, answer in (("before", before), ("after", after))
    )
    asked = f'<div class="rollout context">{html.escape(prompt[-_PROMPT_END:])}</div>'
    return f'{asked}<table class="pair"><tr>{sides}</tr></table>'


def _run(text: str, region: int) -> str:
    colour = _COLOURS.get(TokenRegion(region))
    style = f' style="background:rgba({colour},.45)"' if colour else ""
    return f"<span{style}>{html.escape(text)}</span>"


def _rollout(sample: SampleRollout) -> str:
    heaviest = max((token.weight for token in sample.tokens), default=0.0) or 1.0
    parts = [_token(token, heaviest) for token in sample.tokens]
    more = f" ... and {sample.num_left_out} more tokens" if sample.num_left_out else ""
    said = [("prompt", sample.prompt), ("reference", sample.reference), ("findings", "\n".join(sample.findings))]
    asked = "\n".join(
        f'<details><summary>{name}</summary><div class="rollout context">{html.escape(text)}</div></details>'
        for name, text in said
        if text
    )
    return f'<h3>{html.escape(sample.heading)}</h3>\n<div class="rollout">{"".join(parts)}{more}</div>{asked}'


def _token(token: SampleToken, heaviest: float) -> str:
    """A tool's output, and what belongs to no region, has no colour."""
    text = html.escape(token.text)
    if not token.is_sampled:
        return f'<span class="context">{text}</span>'
    name = REGION_WORDS.get(token.region, "no region")
    title = f"{name}, weight {token.weight:.3f}, entropy {token.entropy:.3f} nats"
    if token.region not in _COLOURS:
        return f'<span title="{title}">{text}</span>'
    alpha = 0.08 + 0.6 * token.weight / heaviest
    return f'<span style="background:rgba({_COLOURS[token.region]},{alpha:.2f})" title="{title}">{text}</span>'


_STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f6f7f9; color: #1d2733; font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 24px; margin: 8px 0 0; }
h2 { font-size: 17px; margin: 0 0 8px; }
h3 { font-size: 14px; margin: 16px 0 4px; }
section { background: #fff; border: 1px solid #e2e6ea; border-radius: 8px; padding: 16px 20px; margin: 16px 0; }
pre { overflow-x: auto; margin: 0; font: 13px/1.45 ui-monospace, monospace; }
img { max-width: 100%; height: auto; display: block; }
.rollout { font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.rollout { border-left: 3px solid #d5dae0; padding-left: 12px; }
.rollout span, .legend span { border-radius: 3px; }
.legend span { padding: 0 6px; }
.numbers { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin: 4px 0 12px; }
.numbers th, .numbers td { padding: 2px 12px; text-align: right; vertical-align: top; overflow-wrap: anywhere; }
.numbers th:first-child, .numbers td:first-child { text-align: left; padding-left: 0; }
.numbers th { border-bottom: 1px solid #d5dae0; font-weight: 600; }
.numbers tr:hover td { background: #f3f6f9; }
details { margin: 4px 0; } summary { cursor: pointer; color: #4a5766; font-size: 13px; }
.context { color: #7a8694; }
.pair { width: 100%; table-layout: fixed; border-collapse: collapse; margin: 4px 0 20px; }
.pair td { vertical-align: top; padding: 4px 12px 4px 0; }
"""
