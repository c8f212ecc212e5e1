"""The HTML page of a run: whole, self-contained, true to the metrics, and safe with what a policy wrote.

The last test looks at it in a real browser and needs chromium (apt-get install chromium).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from megatron_rest.analysis import report
from megatron_rest.analysis.page import PAGE_FILE
from megatron_rest.analysis.series import load_runs
from megatron_rest.analysis.summary import learning_lines, phase_lines
from megatron_rest.data.rollout_file import SavedRollouts, write_rollouts
from megatron_rest.types import TokenRegion
from tests.analysis.runs import make_run
from tests.helpers.tiny_model import build_tokenizer

HOSTILE = '<script>alert(1)</script> & "quoted" \N{SNOWMAN}'
EMPTY_TAGS = {"meta", "img"}


def rollouts(step: int) -> SavedRollouts:
    """Three rollouts of a byte-level vocabulary (id = place of the byte's character): prompt "q", then an answer."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = {character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))}
    spell = ByteLevel(add_prefix_space=False, use_regex=False)
    texts = [HOSTILE, "plain answer", "x" * 3000]
    ids = [[alphabet[c] for c in spell.pre_tokenize_str("q" + text)[0][0]] for text in texts]
    lengths = np.array([len(i) for i in ids], np.int64)
    total = int(lengths.sum())
    mask = np.ones(total, bool)
    mask[np.concatenate([[0], np.cumsum(lengths)[:-1]])] = False
    floats = {name: np.linspace(0, 1, total, dtype=np.float32) for name in ("entropy", "token_weights")}
    return SavedRollouts(
        step=step,
        progress=0.5,
        lengths=lengths,
        group_ids=np.zeros(3, np.int32),
        advantages=np.array([1.0, -1.0, 0.0], np.float32),
        rewards=np.array([2.5, -1.5, 0.0], np.float32) * (1 if step == 1 else -1),
        token_ids=np.concatenate(ids).astype(np.int32),
        loss_mask=mask,
        region_ids=np.where(mask, int(TokenRegion.THINK), 0).astype(np.int8),
        rollout_log_probs=floats["entropy"],
        old_log_probs=floats["entropy"],
        **floats,
    )


class Structure(HTMLParser):
    """Tags and text; fails on one that is not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in EMPTY_TAGS:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("page") / "<b>rest</b>", 12)
    build_tokenizer(folder / "hf")
    for step in (1, 6, 12):
        write_rollouts(folder, rollouts(step))
    assert report.main([str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def page(run_dir) -> Structure:
    structure = Structure()
    structure.feed((run_dir / PAGE_FILE).read_text(encoding="utf-8"))
    assert not structure.open
    return structure


def test_page_is_small_and_fetches_nothing(run_dir, page):
    assert (run_dir / PAGE_FILE).stat().st_size < 5 << 20
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "b"})
    sources = [attributes["src"] for tag, attributes in page.tags if "src" in attributes]
    assert len(sources) == 7
    assert all(str(source).startswith("data:image/png;base64,") for source in sources)
    assert "http" not in (run_dir / PAGE_FILE).read_text(encoding="utf-8").split("<style>")[1].split("</style>")[0]


def test_its_numbers_are_those_of_the_metrics(run_dir, page):
    (run,) = load_runs([run_dir])
    for line in [*learning_lines(run), *phase_lines(run)]:
        assert line in page.text


def test_best_and_worst_rollout_of_the_first_and_the_last_step(page):
    heads = re.findall(r"Step (\d+), reward (\S+),", page.text)
    assert heads == [("1", "2.500"), ("1", "-1.500"), ("12", "1.500"), ("12", "-2.500")]
    shown = "".join(page.text.split("Step 1, reward 2.500")[1].split("tokens", 1)[1].split("Step 1, ")[0].split())
    snowman_in_bytes = "\ufffd" * 3  # one token a byte: none of them is a character
    assert shown == "".join(HOSTILE.replace("\N{SNOWMAN}", snowman_in_bytes).split())


def test_tokens_say_region_weight_and_entropy(page):
    titles = [str(attributes["title"]) for tag, attributes in page.tags if tag == "span" and "title" in attributes]
    assert all(re.fullmatch(r"think, weight \d\.\d{3}, entropy \d\.\d{3} nats", title) for title in titles)


def test_a_long_rollout_is_cut_and_says_so(tmp_path):
    folder = make_run(tmp_path / "long", 3)
    build_tokenizer(folder / "hf")
    one = rollouts(1)
    keep = slice(one.slices[2].start, one.slices[2].stop)
    write_rollouts(
        folder,
        SavedRollouts(
            step=1, progress=0.0, lengths=one.lengths[2:], group_ids=one.group_ids[2:], advantages=one.advantages[2:],
            rewards=one.rewards[2:], **{
                name: getattr(one, name)[keep]
                for name in (
                    "token_ids", "loss_mask", "region_ids", "rollout_log_probs", "old_log_probs", "entropy",
                    "token_weights",
                )
            },
        ),
    )  # fmt: skip
    report.main([str(folder)])
    assert "... and 1800 more tokens" in (folder / PAGE_FILE).read_text(encoding="utf-8")


def test_without_a_tokenizer_the_page_says_what_is_missing(tmp_path, capsys):
    folder = make_run(tmp_path / "bare", 3)
    assert report.main([str(folder)]) == 0
    assert "tokenizer was not found" in (folder / PAGE_FILE).read_text(encoding="utf-8")
    assert report.main([str(folder), "--tokenizer", str(tmp_path)]) == 2
    assert "has no tokenizer.json" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_it_looks_right_in_a_browser(run_dir, tmp_path):
    picture = tmp_path / "page.png"
    (tmp_path / "page.html").write_bytes((run_dir / PAGE_FILE).read_bytes())
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--window-size=1200,4600",
    ]
    done = subprocess.run(
        [*command, f"--screenshot={picture}", f"--user-data-dir={tmp_path / 'profile'}", str(tmp_path / "page.html")],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert picture.is_file(), done.stderr[-2000:]
    pixels = imread(picture)[..., :3]
    inked = (pixels < 0.6).any(axis=-1)
    rows = np.flatnonzero(inked.any(axis=1))
    assert len(rows) > 1500, "tables, seven plots and four rollouts"
