"""The page of a run: what the files say and nothing else, whatever they say; and a real browser shows it."""

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from tests.unet_fast import browser
from tests.unet_fast.a_run import COLUMNS, FILES, HOSTILE, LONG, ODD, QUOTES, SCRIPT, log, write_rows, write_run
from unet_fast import report
from unet_fast.cli import app
from unet_fast.errors import BadInput
from unet_fast.report import write_report

FOLDER = "<img src=x onerror=alert(4)> 'run' \"7\""
VOID = {"meta", "img", "path", "circle"}


class Seen(HTMLParser):
    """Elements with their attributes, the text that is no style sheet, and each <data> with what is shown for it."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.data = "", []  # type: ignore[var-annotated]
        self.headings: list[int] = []
        self._open: list[str] = []
        self.source = page.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag == "data":
            self.data.append([dict(attrs)["value"], ""])
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += data
        if "data" in self._open:
            self.data[-1][1] += data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())

    @property
    def skeleton(self) -> list[tuple[str, list[str]]]:
        return [(tag, sorted(attrs)) for tag, attrs in self.tags]

    def check_harmless(self) -> None:
        names = {tag for tag, _ in self.tags}
        assert not names & {"script", "iframe", "object", "embed", "base", "form", "link", "a:href", "input", "audio"}
        for _, attrs in self.tags:
            assert not [name for name in attrs if name.startswith("on")]
            for name in ("src", "href", "xlink:href", "action", "srcset", "poster"):
                if name in attrs:
                    assert re.match("data:image/png;base64,|#[a-z]+$", attrs[name] or "")
            assert "http" not in (attrs.get("style") or "")
            assert "url(" not in (attrs.get("style") or "")
        styles = "".join(re.findall("<style>(.*?)</style>", self.source, re.DOTALL))
        assert "url(" not in styles
        assert "@import" not in styles


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without curves.png, which takes longer than all of the page."""
    monkeypatch.setattr(report, "draw_curves", lambda path, logs: None)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("runs") / FOLDER, record={"device": "<b>cuda</b>", "git": QUOTES})
    write_report(run)
    return run


def test_the_page_has_what_the_files_have(hostile: Path) -> None:
    seen = Seen(hostile / "report.html")
    best = max((r for r in log() if r["best"]), key=lambda r: r["step"], default={})
    assert f"The best net is that of step {best['step']} (validation loss {float(best['val_loss']):.4f}" in seen.words
    assert "400 of 400 steps in 3 min 20 s on <b>cuda</b>; finished." in seen.words
    for part in ("Curves", "Scores of each validation image", "Settings", "Record of the run", "How to go on"):
        assert part in seen.words
    for part in ("labels understood as", "1,234,567", "numpy==2.3.5", "something new", "elastic", "border_weight"):
        assert part in seen.words
    assert [tag for tag, _ in seen.tags].count("svg") == 6
    assert [tag for tag, _ in seen.tags].count("img") == 4 * 4
    with Image.open(hostile / "curves.png") as picture:
        picture.load()


def test_every_number_is_the_files(hostile: Path) -> None:
    seen = Seen(hostile / "report.html")
    lines = [*(hostile / "log.csv").read_text().splitlines(), *(hostile / "scores.csv").read_text().splitlines()]
    cells = {cell for line in lines for cell in line.split(",")}
    for raw, text in seen.data:
        assert raw in cells
        assert float(text) == pytest.approx(float(raw), abs=0.5001e-4)
    shown = [raw for raw, _ in seen.data]
    validated = [row for row in log() if row["val_loss"]]
    scores = [line.rsplit(",", 5)[1:] for line in lines if line.count(",") == 5 and not line.startswith("image")]
    for raw in (
        *(row[key] for row in validated for key in ("val_loss", "val_iou", "loss")),
        *(each for row in scores for each in row),
    ):
        assert raw in shown or raw == ""


def test_the_worst_image_is_first_and_bars_are_as_long_as_the_numbers(tmp_path: Path, quick: None) -> None:
    run = write_run(
        tmp_path / "run", names=["best.tif", "worst.tif", "none.tif", "middle.tif"], without=["overlays.npz"]
    )
    ious = ["0.9", "0.25", "", "0.5"]
    names = ["best.tif", "worst.tif", "none.tif", "middle.tif"]
    rows = [{"image": name, "loss": 1, "iou": iou} for name, iou in zip(names, ious, strict=True)]
    write_rows(run / "scores.csv", rows)
    seen = Seen(write_report(run))
    places = [seen.source.index(f'<th scope="row" class="name"><bdi>{name}') for name in names]
    assert np.argsort(places).tolist() == [1, 3, 0, 2]
    assert [a["style"] for tag, a in seen.tags if "width" in (a.get("style") or "")] == [
        "width: 25.0%",
        "width: 50.0%",
        "width: 90.0%",
    ]
    write_rows(run / "scores.csv", [{"image": n, "loss": loss} for n, loss in (("a", 1), ("b", 3), ("c", 2))])
    assert re.findall(r'class="name"><bdi>([abc])<', write_report(run).read_text()) == ["b", "c", "a"]


def test_names_are_text_wherever_they_stand(hostile: Path, tmp_path: Path) -> None:
    seen = Seen(hostile / "report.html")
    seen.check_harmless()
    for name in (SCRIPT, QUOTES, LONG):
        assert name in seen.text
    assert FOLDER in seen.text
    # a template in a name is not one
    assert ODD.split(" \u202e")[0] in seen.text
    assert "49" not in set(seen.text.split())
    tame = [re.sub(r"[^.]", "x", name) for name in HOSTILE]
    run = write_run(tmp_path / ("f" * len(FOLDER)), names=tame, record={"device": "cuda", "git": "g" * len(QUOTES)})
    assert Seen(write_report(run)).skeleton == seen.skeleton
    policy = next(a["content"] for tag, a in seen.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "script-src" not in policy


@settings(max_examples=60, deadline=None)
@given(
    name=st.text(max_size=300),
    key=st.text(max_size=40),
    record=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40),
        lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=20), inner, max_size=8),
        max_leaves=30,
    ),
)
def test_any_text_in_any_field_is_text(name: str, key: str, record: Any) -> None:
    with TemporaryDirectory() as place:
        run = Path(place)
        # a pair of surrogates is what a file's name that is no text becomes
        (run / "run.json").write_text(json.dumps({key: record, "validation": [name], "device": name}))
        quoted = json.dumps(name.encode("utf-8", "replace").decode(), ensure_ascii=True).replace("\x7f", "")
        (run / "config.toml").write_text(f"steps = 10\nnew = {quoted}\n")
        write_rows(run / "scores.csv", [{"image": name.encode("utf-8", "replace").decode(), "iou": "0.5"}])
        seen = Seen(write_report(run))
    seen.check_harmless()
    cleaned = name.encode("utf-8", "replace").decode()
    if cleaned.isprintable() and cleaned.strip():
        assert " ".join(cleaned.split()) in seen.words


def test_control_characters_are_shown_as_pictures(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"validation": ["a\x00b\x1b[31m\x7f.tif", "\ud800.tif"]}))
    seen = Seen(write_report(tmp_path))
    assert "a␀b␛[31m␡.tif" in seen.text
    assert "?.tif" in seen.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f]", seen.source)


@pytest.mark.parametrize("count", range(6))
def test_what_is_not_there_yet_is_no_reason_to_fail(count: int, tmp_path: Path, quick: None) -> None:
    for number, without in enumerate(combinations(FILES, count)):
        run = write_run(tmp_path / str(number), names=["a.tif"], size=32, without=without)
        seen = Seen(write_report(run))
        assert ("No net has been kept yet" in seen.words) == ("log.csv" in without)
        for name, said in (
            ("log.csv", "Nothing has been logged yet"),
            ("overlays.npz", "drawn from overlays.npz"),
            ("scores.csv", "read from scores.csv"),
            ("config.toml", "read from config.toml"),
            ("run.json", "read from run.json"),
        ):
            assert (said in seen.words) == (name in without), (name, without)
        assert ("unet-fast predict" in seen.words) == ("model.safetensors" not in without)
        assert "Worth knowing" not in seen.words


def test_empty_files_are_not_there_yet(tmp_path: Path) -> None:
    for name in FILES:
        (tmp_path / name).touch()
    seen = Seen(write_report(tmp_path))
    assert "Nothing has been logged yet" in seen.words
    assert "Worth knowing" not in seen.words


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.toml", b"steps = \n"),
        ("config.toml", b"\xff\xfe"),
        ("run.json", b'{"a": '),
        ("run.json", b"[1, 2]"),
        ("run.json", b"[" * 100_000),
        ("log.csv", b"step," + b"x" * 200_000 + b"\n1,2\n"),
        ("overlays.npz", b"PK\x03\x04 not a zip"),
        ("overlays.npz", b"\x80\x04K\x01."),
        (
            "overlays.npz",
            b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (), }".ljust(127)
            + b"\n"
            + 8 * b"0",
        ),
    ],
    ids=["toml", "not text", "json", "no object", "deep", "wide", "zip", "pickle", "one array"],
)
def test_what_is_damaged_is_named_and_the_rest_is_there(name: str, content: bytes, tmp_path: Path, quick: None) -> None:
    run = write_run(tmp_path / "run", names=["a.tif"], size=32)
    (run / name).write_bytes(content)
    words = Seen(write_report(run)).words
    assert f"{name} cannot be read and is left out" in words
    assert "unet-fast predict" in words


def test_overlays_that_are_cut_off_or_do_not_fit_are_named(tmp_path: Path, quick: None) -> None:
    run = write_run(tmp_path / "run", names=["a.tif"], size=32)
    whole = (run / "overlays.npz").read_bytes()
    for share in (0.1, 0.5, 0.9, 0.99):
        (run / "overlays.npz").write_bytes(whole[: int(share * len(whole))])
        assert "overlays.npz cannot be read" in Seen(write_report(run)).words
    np.savez(run / "overlays.npz", image_0=np.zeros((4, 5)), truth_0=np.zeros((5, 4), int), names=["a"])
    assert "truth_0 must be [H, W] of (4, 5), got (5, 4)" in Seen(write_report(run)).words
    np.savez(run / "overlays.npz", image_0=np.array([{}], dtype=object), names=["a"])
    assert "overlays.npz cannot be read" in Seen(write_report(run)).words


def test_overlays_may_lack_parts_and_hold_what_is_no_number(tmp_path: Path, quick: None) -> None:
    run = write_run(tmp_path / "run", names=["a.tif"], size=32)
    image = np.full((30, 7), np.nan, np.float32)
    weight = np.full((30, 7), np.inf, np.float16)
    np.savez(run / "overlays.npz", image_0=image, weight_0=weight, image_1=np.arange(5000.0).reshape(2, 2500))
    seen = Seen(write_report(run))
    assert "Worth knowing" not in seen.words
    assert [a["alt"] for tag, a in seen.tags if tag == "img"] == [
        "slice 0 as it is",
        "weight of each pixel of slice 0, from 0 to 0",
        "the weight map of slice 0 enlarged where it is greatest, with the outlines of the cells",
        "slice 1 as it is",
    ]


CELL = st.sampled_from(["", "nan", "inf", "-inf", "1e308", "-1e308", "1e-320", "0", "-0.0", "word", "1_0", " 2 "]) | (
    st.floats(allow_nan=False, allow_infinity=False).map("{:.6g}".format)
)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.fixed_dictionaries(dict.fromkeys(COLUMNS, CELL)), max_size=12),
    steps=st.none() | st.integers(-5, 2**62),
)
def test_any_log_is_a_page(rows: list[dict[str, str]], steps: int | None) -> None:
    with TemporaryDirectory() as place:
        run = Path(place)
        write_rows(run / "log.csv", rows, COLUMNS)
        (run / "config.toml").write_text("" if steps is None else f"steps = {steps}\n")
        seen = Seen(write_report(run))
    seen.check_harmless()
    numbers = re.findall(r'(?:\bd|cx|cy|x|y)="([^"]*)"', seen.source)
    assert not re.search("nan|inf|e[+-]", " ".join(numbers))


def test_a_long_log_stays_small_and_keeps_its_peaks(tmp_path: Path, quick: None) -> None:
    rows = [{"step": i, "loss": 5.0 if i == 7777 else 0.5 + 0.1 * (i % 7)} for i in range(1, 50_001)]
    write_rows(tmp_path / "log.csv", rows)
    seen = Seen(write_report(tmp_path))
    assert len(seen.source) < 60_000
    [line] = [a["d"] for tag, a in seen.tags if (a.get("class") or "") == "line training"]
    assert line is not None
    heights = [float(point.split()[1]) for point in re.split("[ML]", line)[1:]]
    assert min(heights) == 10


def test_the_same_files_give_the_same_bytes(hostile: Path) -> None:
    before = [(hostile / name).read_bytes() for name in ("report.html", "curves.png")]
    assert write_report(hostile) == hostile / "report.html"
    assert [(hostile / name).read_bytes() for name in ("report.html", "curves.png")] == before
    assert not [p for p in hostile.iterdir() if p.name.startswith(".")]


def test_a_page_is_small_enough_to_be_mailed_and_soon_there(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", names=[f"{i}.tif" for i in range(4)], size=512, noise=True)
    start = time.process_time()
    size = write_report(run).stat().st_size
    # 1.1 s; a busy machine is slower
    assert time.process_time() - start < 5
    assert size < 6_000_000


def test_cells_that_were_missed_are_counted() -> None:
    truth, found = np.zeros((2, 20, 40), np.int32)
    truth[0:10, 0:10], truth[0:10, 10:20], truth[0:10, 30:40], truth[10:20, 30:40] = 1, 2, 7, -1
    # the first with half of another, the second not, the third by two halves; what lies in the ignored part is nothing
    found[0:10, 0:15], found[0:5, 30:40], found[5:20, 30:40] = 3, 4, 5
    assert np.unique(report._missed(truth, found)).tolist() == [0, 2, 7]
    assert np.array_equal(report._missed(truth, np.zeros_like(found)), np.maximum(truth, 0))
    assert not report._missed(truth, truth).any()


def test_pictures_of_large_images_are_made_smaller(tmp_path: Path, quick: None) -> None:
    names = [f"{i}.tif" for i in range(11)]
    run = write_run(tmp_path / "run", names=names, size=32)
    generator = np.random.default_rng(0)
    arrays: dict[str, Any] = {"names": np.array(names)}
    for i in range(11):
        arrays |= {f"image_{i}": generator.integers(0, 255, (1100, 800), np.uint8)}
        arrays |= {f"truth_{i}": np.zeros((1100, 800), np.int32)}
    np.savez(run / "overlays.npz", **arrays)
    place = write_report(run)
    assert place.stat().st_size < 6_000_000
    assert "and 3 more, in overlays.npz" in Seen(place).words


def test_a_page_that_cannot_be_written_leaves_the_one_before(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (hostile / "report.html").read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(BadInput, match="cannot be written: No space left"):
        write_report(hostile)
    assert (hostile / "report.html").read_bytes() == before
    assert not [p for p in hostile.iterdir() if p.name.startswith(".")]


def falling(rows: list[dict[str, Any]]) -> None:
    for i, row in enumerate(rows):
        row["loss"] = 2 / (i + 1)
        if row["val_loss"]:
            row["val_loss"] = 2 / (i + 1)


def learnt_by_heart(rows: list[dict[str, Any]]) -> None:
    for i, row in enumerate(rows):
        row["loss"] = 1 / (i + 1)
        if row["val_loss"]:
            row["val_loss"] = 0.5 + abs(i - 7) * 0.05


def setting(key: str, value: Any) -> Callable[[list[dict[str, Any]]], None]:
    def change(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (setting("skipped", 2), "40 of 400 steps changed nothing"),
        (setting("busy", 0.31), "The device was at work 31% of the time"),
        (setting("loss", "nan"), "20 of 20 rows of log.csv have a loss that is no number"),
        (falling, "The validation loss was still falling at the end"),
        (learnt_by_heart, "The net learns its training images by heart: since step 160 the validation loss has risen"),
        (lambda rows: None, None),
    ],
    ids=["skipped", "idle", "no number", "falling", "overfitted", "good"],
)
def test_what_is_wrong_is_said_and_nothing_else(change: Any, said: str | None, tmp_path: Path, quick: None) -> None:
    rows = log()
    change(rows)
    words = Seen(write_report(write_run(tmp_path / "run", names=["a.tif"], size=32, rows=rows))).words
    assert ("Worth knowing" in words) == (said is not None)
    assert said is None or said in words
    assert sum(word in words for word in ("still falling", "by heart", "changed nothing", "was at work")) <= 1


def test_a_run_without_validation_says_so(tmp_path: Path, quick: None) -> None:
    rows = [{**row, **{key: "" for key in row if key.startswith("val")}, "best": 1} for row in log()]
    run = write_run(tmp_path / "run", names=["a.tif"], rows=rows, record={"validation": []}, without=["scores.csv"])
    words = Seen(write_report(run)).words
    assert "No image was held out for validation" in words
    assert "The best net is that of step 400; 400 of 400 steps" in words


def test_a_run_that_is_not_finished_says_how_to_go_on(tmp_path: Path, quick: None) -> None:
    run = write_run(tmp_path / "a run's", names=["a.tif"], size=32, rows=log(done=200))
    seen = Seen(write_report(run))
    assert "200 of 400 steps" in seen.words
    assert "not finished: it is going on, or was interrupted" in seen.words
    quoted = "'" + str(run).replace("'", "'\"'\"'") + "'"
    assert f"unet-fast train --out {quoted} --resume" in seen.text
    assert f"unet-fast predict -m {quoted} --images IMAGES --out RESULTS --output instances" in seen.text
    finished = Seen(write_report(write_run(run, names=["a.tif"], size=32)))
    assert "--resume" not in finished.text


def test_settings_that_differ_are_first_and_marked(hostile: Path) -> None:
    source = (hostile / "report.html").read_text(encoding="utf-8")
    marked = re.findall(r'<tr class="marked"><th scope="row" class="name"><bdi>(\w+)', source)
    assert marked == ["features", "momentum", "lr"]
    assert source.index("<bdi>lr<") < source.index("settings at their defaults") < source.index("<bdi>dropout<")


def test_the_page_can_be_read_by_those_who_do_not_see_it(hostile: Path) -> None:
    seen = Seen(hostile / "report.html")
    assert ("html", {"lang": "en"}) in seen.tags
    assert seen.headings[0] == 1
    assert seen.headings.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(seen.headings, seen.headings[1:], strict=False))
    assert all(attrs.get("alt") for tag, attrs in seen.tags if tag == "img")
    assert all(attrs.get("aria-label") for tag, attrs in seen.tags if tag == "svg")
    ids = [attrs["id"] for _, attrs in seen.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {f"#{each}" for each in ids} >= {attrs["href"] for tag, attrs in seen.tags if tag == "a"}
    assert all("scope" in attrs for tag, attrs in seen.tags if tag == "th")


def test_the_verb_says_where_the_page_lies(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", names=["a.tif"], size=32)
    done = CliRunner().invoke(app, ["report", "--run", str(run)])
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{run / 'report.html'}\n"
    (tmp_path / "empty").mkdir()
    for place, said in (("empty", "expected the folder of a training run"), ("missing", "does not exist")):
        done = CliRunner().invoke(app, ["report", "--run", str(tmp_path / place)])
        assert done.exit_code == 3
        assert said in done.stderr
        assert not (tmp_path / place / "report.html").exists()


# ---- in a browser


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    program = browser.found()
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(browser.NAMES)} is installed (.ci/browser does that on Debian)")
    with browser.tab(program, tmp_path_factory.mktemp("browser") / "profile") as page:
        yield page


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, False), (1280, True)])
def test_a_browser_shows_the_page(tab: browser.Page, hostile: Path, width: int, dark: bool, tmp_path: Path) -> None:
    page = hostile / "report.html"
    tab.open(page, width, dark=dark)
    assert tab.said == []
    assert tab.asked == [page.absolute().as_uri()]
    widths = tab.value("[...document.images].map(i => i.complete ? i.naturalWidth : 0)")
    assert len(widths) == 16
    assert min(widths) > 0
    for name in (SCRIPT, FOLDER):
        assert name in tab.value("document.body.innerText")
    # nothing sticks out at the side; tables and commands scroll where they stand
    assert tab.value("document.documentElement.scrollWidth") == width
    assert tab.value("document.scripts.length") == 0
    luminance = sum(map(int, re.findall(r"\d+", tab.value("getComputedStyle(document.body).backgroundColor"))))
    assert (luminance < 200) == dark
    tab.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.width == width
        assert np.asarray(picture.convert("L")).std() > 5
    if kept := os.environ.get("UNET_FAST_SCREENSHOTS"):
        tab.screenshot(Path(kept) / f"page_{width}_{'dark' if dark else 'light'}.png")


@pytest.mark.slow
def test_were_a_script_in_the_page_it_would_not_run(tab: browser.Page, hostile: Path, tmp_path: Path) -> None:
    """What escaping is for, once more by the policy; and a browser's complaints are heard."""
    source = (hostile / "report.html").read_text(encoding="utf-8")
    put = '<script>document.title = "ran"</script><img src="http://127.0.0.1:9/x.png" onerror="document.title=\'ran\'">'
    for name, text in (("with", source), ("without", re.sub("<meta http-equiv.*", "", source))):
        (tmp_path / f"{name}.html").write_text(text.replace("</body>", f"{put}</body>"), encoding="utf-8")
    tab.open(tmp_path / "with.html", 1280)
    assert tab.value("document.title") != "ran"
    assert sum("Content Security Policy" in said for said in tab.said) >= 2
    tab.open(tmp_path / "without.html", 1280)
    assert tab.value("document.title") == "ran"
    assert "http://127.0.0.1:9/x.png" in tab.asked
