"""The pictures of the documents.

    python docs/make_pictures.py                         data_flow.svg, weights.svg, transfer.svg (make pictures)
    python docs/make_pictures.py --run RUN [--log FILE]  report.png, answer.png of a finished run's report.html,
                                                        and terminal.png, of what its training printed (chromium)

weights.svg is computed: a reference answer of the shipped data, labelled and weighted by the code that trains.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
SAMPLES = ROOT / "data_tools" / "samples" / "rlla_sft.json"
INK, PALE, LINE = "#222", "#eef1f5", "#5b6b7f"
ENGINE, TRAIN, JUDGE = "#fdf0dc", "#e3ecf7", "#e6f3e6"
COLUMNS, CELL, ROW = 92, 8.2, 21  # of the weighted answer: characters a line, pixels a character and a line


def svg(width: float, height: float, title: str, body: Iterable[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" font-family="sans-serif"'
    ground = f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>'
    arrow = '<marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    arrow = f'<defs>{arrow}<path d="M0,0 L8,4 L0,8 z" fill="{LINE}"/></marker></defs>'
    return "\n".join([f'{head} font-size="13">', f"<title>{title}</title>", arrow, ground, *body, "</svg>", ""])


def box(x: float, y: float, w: float, h: float, fill: str, head: str, *lines: str) -> str:
    texts = [f'<text x="{x + w / 2:g}" y="{y + 21:g}" font-weight="bold">{html.escape(head)}</text>']
    small = 'font-size="12"'
    texts += [
        f'<text x="{x + w / 2:g}" y="{y + 40 + 17 * i:g}" {small}>{html.escape(t)}</text>' for i, t in enumerate(lines)
    ]
    shape = f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="6" fill="{fill}" stroke="{LINE}"/>'
    return f'{shape}<g text-anchor="middle" fill="{INK}">{"".join(texts)}</g>'


def arrow(*points: tuple[float, float]) -> str:
    path = " L".join(f"{x:g},{y:g}" for x, y in points)
    return f'<path d="M{path}" fill="none" stroke="{LINE}" stroke-width="1.8" marker-end="url(#a)"/>'


def note(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" fill="#555" font-size="12" text-anchor="{anchor}">{html.escape(text)}</text>'


def data_flow() -> str:
    """A step: sampling and judging at the top, training below, the weights back on the left."""
    top, low, wide, gap = 44, 214, 156, 36
    upper = [
        (PALE, "prompts", "of the step,", "chosen by the seed"),
        (ENGINE, "vLLM engines", "n answers a prompt:", "ids and log-probs"),
        (JUDGE, "regions", "what each sampled", "token is for"),
        (JUDGE, "reward", "format +", "correctness"),
        (JUDGE, "advantages", "against the siblings", "of the same prompt"),
    ]
    lower = [
        (ENGINE, "weight transfer", "digests on both sides,", "canary"),
        (TRAIN, "clipped loss", "Megatron's schedule,", "one optimizer step"),
        (TRAIN, "token weights", "by region, progress,", "entropy; mean 1"),
        (TRAIN, "scoring", "log-probs, entropy:", "vocabulary-parallel"),
        (TRAIN, "packing", "microbatches; as much", "for every replica"),
    ]
    left = [20 + (wide + gap) * i for i in range(5)]
    body = [note(20, 28, "sampled and judged", "start"), note(20, 314, "trained: TP, PP, CP, EP, DP", "start")]
    for x, above, below in zip(left, upper, lower, strict=True):
        body += [box(x, top, wide, 76, *above), box(x, low, wide, 76, *below)]
    for x in left[1:]:
        body += [arrow((x - gap, top + 38), (x - 2, top + 38)), arrow((x, low + 38), (x - gap + 2, low + 38))]
    first, second, last = (left[i] + wide / 2 for i in (0, 1, 4))
    body += [
        arrow((last, top + 76), (last, low - 2)),
        arrow((first, low), (first, 167), (second, 167), (second, top + 78)),
        note((first + second) / 2, 185, "the new policy, verified"),
    ]
    return svg(left[4] + wide + 20, 330, "The data flow of a step", body)


def transfer() -> str:
    """Layers cut by stage and rank on one side, by worker on the other."""
    colours = ("#8db1dc", "#bcd2ee", "#e9b56d", "#f4d9ae")
    names = ("rank 0: stage 0, TP 0", "rank 1: stage 0, TP 1", "rank 2: stage 1, TP 0", "rank 3: stage 1, TP 1")
    body = [note(130, 26, "Megatron: TP 2 x PP 2"), note(700, 26, "one vLLM engine: TP 2")]
    for i, (colour, name) in enumerate(zip(colours, names, strict=True)):
        y = 40 + 68 * i
        body.append(f'<rect x="40" y="{y}" width="180" height="52" rx="5" fill="{colour}"/>')
        body.append(f'<text x="130" y="{y + 31}" text-anchor="middle" fill="{INK}">{name}</text>')
    for worker in range(2):
        y = 44 + 140 * worker
        body.append(f'<rect x="580" y="{y}" width="240" height="98" rx="5" fill="none" stroke="{LINE}"/>')
        body.append(note(700, y + 116, f"worker {worker}: its slice of every layer"))
        for stage in range(2):
            rank, top = 2 * stage + worker, y + 8 + 43 * stage
            body.append(f'<rect x="588" y="{top}" width="224" height="39" fill="{colours[rank]}"/>')
            layers = ("first", "second")[stage]
            body.append(
                f'<text x="700" y="{top + 24}" text-anchor="middle" fill="{INK}">{layers} half of the layers</text>'
            )
            body.append(arrow((220, 66 + 68 * rank), (360, 66 + 68 * rank), (440, top + 20), (586, top + 20)))
    body += [
        note(430, 346, "A plan made once says which box of which tensor goes where: every byte travels once."),
        note(430, 364, "A digest where a message is made and where it is loaded; then both sides score the canary."),
    ]  # fmt: skip
    return svg(860, 380, "Slices of training shards go straight to the workers that need them", body)


def weighted_answer() -> tuple[list[str], list[int], dict[float, list[float]]]:
    """Pieces of a shipped reference answer, their regions, and their weights at the start and the end of a run."""
    sys.path[:0] = [str(ROOT)]
    from megatron_rest.regions import label_regions
    from megatron_rest.weighting import RestWeighting

    answers = [row["output"] for row in json.loads(SAMPLES.read_text(encoding="utf-8"))]
    text = min((a for a in answers if a.count('{"name"') > 1 and a.isascii()), key=len) + "<|im_end|>"
    pieces = re.findall(r"<\|\w+\|>|</?\w+>|\s?\w+|\s+|[^\w\s]", text)  # about as a tokenizer cuts
    regions = label_regions([piece.encode() for piece in pieces])
    weighting = RestWeighting.paper()
    weights = {progress: weighting(regions, progress=progress).tolist() for progress in (0.0, 1.0)}
    return pieces, [int(region) for region in regions], weights


def weights() -> str:
    """The same answer twice; colour by region, opacity by weight."""
    sys.path[:0] = [str(ROOT)]
    from megatron_rest.analysis.page import _COLOURS
    from megatron_rest.analysis.samples import REGION_WORDS

    pieces, regions, by_progress = weighted_answer()
    colours = {int(region): colour for region, colour in _COLOURS.items()}
    most = max(max(w) for w in by_progress.values())
    body, y = [], 24.0
    x = 20.0
    for region, word in REGION_WORDS.items():
        if int(region) in colours and int(region) in regions:
            body.append(f'<rect x="{x:g}" y="12" width="14" height="14" fill="rgb({colours[int(region)]})"/>')
            body.append(note(x + 20, 24, word, "start"))
            x += 44 + 7 * len(word)
    for progress, values in by_progress.items():
        of = dict(zip(regions, values, strict=True))
        told = ", ".join(f"{REGION_WORDS[r]} {of[int(r)]:.2f}" for r in REGION_WORDS if int(r) in of)
        y += 34
        body.append(f'<text x="20" y="{y:g}" fill="{INK}" font-weight="bold">{_when(progress)}</text>')
        body.append(note(230, y, told, "start"))
        y += 10
        column = 0
        for piece, region, value in zip(pieces, regions, values, strict=True):
            for part in re.findall(r"\n|[^\n]+", piece):
                if part == "\n" or (column + len(part) > COLUMNS and part[0] == " "):
                    y, column = y + ROW, 0
                    part = part.strip("\n ")
                if part:
                    body.append(_cell(part, 20 + CELL * column, y, colours.get(region), value / most))
                    column += len(part)
        y += ROW
    return svg(40 + CELL * COLUMNS, y + 16, "One answer, each token shaded by its weight", body)


def _when(progress: float) -> str:
    return "first step (progress 0)" if progress == 0 else "last step (progress 1)"


def _cell(text: str, x: float, y: float, colour: str | None, share: float) -> str:
    width = CELL * len(text)
    shade = f'fill="rgb({colour})" fill-opacity="{0.12 + 0.68 * share:.2f}"' if colour else f'fill="{PALE}"'
    letters = html.escape(text.replace(" ", "\N{NO-BREAK SPACE}"))
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{ROW - 3}" {shade}/>'
        f'<text x="{x:g}" y="{y + 14:g}" font-family="monospace" font-size="13.5" fill="{INK}" '
        f'textLength="{width:g}" lengthAdjust="spacingAndGlyphs">{letters}</text>'
    )


def screenshots(run: Path, log: Path | None) -> Iterator[Path]:
    """Of a finished run."""
    page = (run / "report.html").read_text(encoding="utf-8")
    yield photograph(page, "report.png", width=1100, height=1300)
    body = page.partition("<h2>Sample rollouts</h2>")[2].partition("</main>")[0]
    head = page.partition("<body>")[0]
    yield photograph(f"{head}<body><main><section>{body}</main></body></html>", "answer.png", width=1100, height=620)
    if log is not None:
        lines = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(encoding="utf-8"))
        style = "background:#1d1f21;color:#d8dee0;font:13px monospace;padding:16px;margin:0"
        yield photograph(
            f'<body style="margin:0"><pre style="{style}">{html.escape(lines)}</pre>', "terminal.png", 1275, 560
        )


def photograph(page: str, name: str, width: int, height: int) -> Path:
    browser = shutil.which("chromium")
    if browser is None:
        raise SystemExit("screenshots need chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        file, picture = Path(folder, "page.html"), IMAGES / name
        file.write_text(page, encoding="utf-8")
        subprocess.run(
            [
                *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                *(f"--window-size={width},{height}", f"--screenshot={picture}", f"--user-data-dir={folder}/profile"),
                str(file),
            ],
            check=True, capture_output=True, timeout=300,
        )  # fmt: skip
    return picture


def main() -> int:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a finished run with report.html")
    parser.add_argument("--log", type=Path, help="what its training printed")
    args = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    for name, picture in (("data_flow", data_flow), ("transfer", transfer), ("weights", weights)):
        (IMAGES / f"{name}.svg").write_text(picture(), encoding="utf-8")
        print(IMAGES / f"{name}.svg")
    for path in screenshots(args.run, args.log) if args.run else ():
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
