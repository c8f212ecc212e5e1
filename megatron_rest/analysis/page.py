"""A run as one HTML file that can be mailed: tables, plots, sample rollouts with their regions and weights.

Self-contained (pictures are inside, nothing is fetched, no script) and written whole or not at all.  Every number comes
from the files of the run, as in the text report; what a policy wrote is escaped, never markup.
"""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_rest.analysis.evidence import evidence_lines
from megatron_rest.analysis.series import RunMetrics
from megatron_rest.analysis.summary import duration, learning_lines, phase_lines
from megatron_rest.token_region import TokenRegion

if TYPE_CHECKING:
    from megatron_rest.data.rollout_file import SavedRollouts

__all__ = ["PAGE_FILE", "write_page"]

PAGE_FILE = "report.html"
_SHOWN = 2  # rollouts of a saved step: the one with the highest and the one with the lowest reward
_MAX_TOKENS = 1200  # of one rollout; what is left out is counted on the page
_COLOURS = {  # the regions' colours of the plots
    TokenRegion.FORMAT: "0,114,178",
    TokenRegion.TOOL_NAME: "213,94,0",
    TokenRegion.TOOL_ARGS: "230,159,0",
    TokenRegion.THINK: "0,158,115",
    TokenRegion.RESPONSE: "204,121,167",
}
_TITLES = {
    "reward": "Reward",
    "entropy": "Entropy by region",
    "weight_mass": "Weight mass by region",
    "phases": "Where the time went",
    "mismatch": "Rollout engine against trainer",
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
    yield from _section("What it learned", _text(learning_lines(run)))
    for picture in pictures:
        yield from _section(_TITLES.get(picture.stem, picture.stem), _image(picture))
    yield from _section("Time", _text(phase_lines(run)))
    evidence = evidence_lines(run.run_dir)
    if evidence:
        yield from _section("Variance of the policy gradient", _text(evidence))
    yield from _section("Sample rollouts", "\n".join(_samples(run.run_dir, tokenizer)))
    yield "</main></body></html>"


def _section(title: str, body: str) -> Iterator[str]:
    yield f"<section><h2>{html.escape(title)}</h2>\n{body}\n</section>"


def _text(lines: Sequence[str]) -> str:
    return f"<pre>{html.escape(chr(10).join(lines))}</pre>"


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">'


def _samples(run_dir: Path, tokenizer: Any) -> Iterator[str]:
    """Best and worst rollout of the first and the last saved step."""
    if tokenizer is None:
        yield "<p>Not shown: the policy's tokenizer was not found (give <code>--tokenizer FOLDER</code>).</p>"
        return
    from megatron_rest.data.rollout_file import read_rollouts, rollout_files
    from megatron_rest.regions import token_bytes_table

    files = rollout_files(run_dir)
    if not files:
        yield "<p>The run has saved none.</p>"
        return
    table = token_bytes_table(tokenizer)
    legend = zip(_COLOURS.values(), ("format", "tool name", "arguments", "thinking", "response"), strict=True)
    marks = " ".join(f'<span style="background:rgba({colour},.45)">{name}</span>' for colour, name in legend)
    yield f'<p class="legend">{marks}; stronger colour, larger weight; point at a token for its numbers.</p>'
    for path in dict([files[0], files[-1]]).values():
        rollouts = read_rollouts(path)
        order = np.argsort(rollouts.rewards, kind="stable")
        for index in dict.fromkeys([int(order[-1]), int(order[0])][:_SHOWN]):
            yield _rollout(rollouts, index, table)


def _rollout(rollouts: SavedRollouts, index: int, table: Sequence[bytes]) -> str:
    at = rollouts.slices[index]
    start = at.start + int(np.argmax(rollouts.loss_mask[at]))
    stop = min(at.stop, start + _MAX_TOKENS)
    heaviest = max(float(rollouts.token_weights[at].max()), 1e-6)
    parts = [_token(rollouts, i, table, heaviest) for i in range(start, stop)]
    head = (
        f"Step {rollouts.step}, reward {rollouts.rewards[index]:.3f}, advantage {rollouts.advantages[index]:+.3f}, "
        f"{at.stop - start} tokens"
    )
    more = f" ... and {at.stop - stop} more tokens" if stop < at.stop else ""
    return f'<h3>{html.escape(head)}</h3>\n<div class="rollout">{"".join(parts)}{more}</div>'


def _token(rollouts: SavedRollouts, i: int, table: Sequence[bytes], heaviest: float) -> str:
    """One token, its half characters replaced; a tool's output has no colour."""
    text = html.escape(table[int(rollouts.token_ids[i])].decode("utf-8", errors="replace"))
    if not rollouts.loss_mask[i]:
        return f'<span class="context">{text}</span>'
    region, weight = TokenRegion(int(rollouts.region_ids[i])), float(rollouts.token_weights[i])
    alpha = 0.08 + 0.6 * weight / heaviest
    name = region.name.lower().replace("_", " ")
    title = f"{name}, weight {weight:.3f}, entropy {float(rollouts.entropy[i]):.3f} nats"
    return f'<span style="background:rgba({_COLOURS[region]},{alpha:.2f})" title="{title}">{text}</span>'


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
.context { color: #7a8694; }
"""
