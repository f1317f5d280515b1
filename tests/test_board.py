"""Two runs on different backends side by side in TensorBoard, over its HTTP interface and in a browser."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from longnet_kit import board
from longnet_kit.callbacks.board import LAYOUT
from tests.parallel import desk

pytestmark = pytest.mark.timeout(600)
BACKENDS = "dilated", "sdpa"
SHORT = ["trainer.max_steps=6", "trainer.log_every_n_steps=2", "trainer.val_check_interval=4",
         "trainer.limit_val_batches=1", "data.seq_len=128", "data.batch_size=2",
         "data.eval_contexts=[32,64]"]  # fmt: skip
RUNS = {f"{backend}/version_0" for backend in BACKENDS}
BROWSER, DRIVER = (
    next(filter(None, map(shutil.which, names)), None)
    for names in (("chromium", "chromium-browser", "google-chrome"), ("chromedriver",))
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the quickstart's model was trained on two backends, shortly; one of them in two goes."""
    folder = tmp_path_factory.mktemp("board")
    for backend in BACKENDS:
        kind = [] if backend == "dilated" else [f"model.attention.backend={backend}"]
        run = ["fit", "quickstart", *SHORT, *kind, f"name={backend}"]
        if backend == "sdpa":
            desk.longnet(folder, *run, "trainer.max_steps=4")
        desk.longnet(folder, *run, "resume=auto")
    return folder


def served(folder: Path) -> tuple[subprocess.Popen[str], str]:
    """TensorBoard as `longnet board` starts it, and its address."""
    command = [sys.executable, "-m", "longnet_kit.cli", "board", "--port", "0"]
    process = subprocess.Popen(
        command, cwd=folder, env=desk.environment(), text=True, stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # as on a terminal
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("TensorBoard on runs, 2 runs: http://localhost:") and line.endswith("(Ctrl-C ends it)\n")
    return process, line.split()[5]


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    process, url = served(folder)
    yield url
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 0  # on a busy machine
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=5)


def get(address: str, path: str, body: Any = None, **query: str) -> Any:
    """What TensorBoard answers; it reads the runs in the background, so nothing for a while is no failure."""
    url = f"{address}data/{path}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def eventually(ask: Callable[[], Any], is_right: Callable[[Any], bool], seconds: float = 60) -> Any:
    """The first right answer; the last one if there was none in time."""
    deadline = time.monotonic() + seconds
    while not is_right(answer := ask()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return answer


def scalars_of(folder: Path, backend: str) -> dict[str, dict[int, float]]:
    """Every scalar by tag and step, as metrics.csv has it."""
    lines = (folder / "runs" / backend / "version_0" / "metrics.csv").read_text().splitlines()
    header, *rows = (line.split(",") for line in lines)
    step = header.index("step")
    found: dict[str, dict[int, float]] = {tag: {} for tag in header if tag not in ("step", "epoch")}
    for row in rows:
        for tag in found:
            if value := row[header.index(tag)]:
                found[tag][int(row[step])] = float(value)
    return found


def test_scalars_of_both_runs_share_tags_and_steps(folder: Path, address: str) -> None:
    tags = eventually(lambda: get(address, "plugin/scalars/tags"), lambda tags: set(tags) == RUNS)
    assert set(tags) == RUNS
    assert len({frozenset(of_run) for of_run in tags.values()}) == 1
    for backend in BACKENDS:
        written = scalars_of(folder, backend)
        assert set(tags[f"{backend}/version_0"]) - set(written) == {
            f"vs_tokens/{tag}" for tag in ("train/loss", "val/loss", "val/perplexity", "val/bits_per_byte")
        }
        for tag, values in written.items():

            def ask(tag: str = tag, run: str = f"{backend}/version_0") -> dict[int, float]:
                return {int(step): value for _, step, value in get(address, "plugin/scalars/scalars", run=run, tag=tag)}

            read = eventually(ask, lambda read, values=values: set(read) == set(values))
            assert read == pytest.approx(values, rel=1e-6)
    steps = [{tag: set(values) for tag, values in scalars_of(folder, backend).items()} for backend in BACKENDS]
    assert steps[0] == steps[1], "the run that was resumed has other steps"


def test_curves_against_tokens_outlive_what_a_resumed_run_lets_be_forgotten(folder: Path) -> None:
    """As TensorBoard reads them without its data server, which forgets less."""
    events = EventAccumulator(str(folder / "runs" / "sdpa" / "version_0")).Reload()
    assert [event.step for event in events.Scalars("vs_tokens/train/loss")] == [2 * 256, 4 * 256, 6 * 256]
    assert [event.step for event in events.Scalars("vs_tokens/val/loss")] == [4 * 256, 6 * 256]


@pytest.mark.parametrize("backend", BACKENDS)
def test_curves_against_tokens_have_no_gap_where_a_run_was_resumed(backend: str, folder: Path, address: str) -> None:
    def ask() -> list[int]:
        answer = get(address, "plugin/scalars/scalars", run=f"{backend}/version_0", tag="vs_tokens/train/loss")
        return [int(step) for _, step, _ in answer]

    eventually(lambda: get(address, "plugin/scalars/tags"), lambda tags: set(tags) == RUNS)
    assert eventually(ask, lambda steps: len(steps) == 3) == [2 * 256, 4 * 256, 6 * 256]


def test_hyper_parameters_that_differ_and_final_metrics_are_in_one_table(folder: Path, address: str) -> None:
    eventually(lambda: get(address, "plugin/scalars/tags"), lambda tags: set(tags) == RUNS)
    experiment = get(address, "plugin/hparams/experiment", {"experimentName": ""})
    differing = {info["name"] for info in experiment["hparamInfos"] if info.get("differs")}
    assert differing == {"name", "model.attention.backend"}  # those of the recipe that the resumed run ended with
    names = {info["name"] for info in experiment["hparamInfos"]}
    assert {"model.attention.segment_lengths", "trainer.max_steps", "data.seq_len"} <= names
    metrics = [info["name"] for info in experiment["metricInfos"]]
    query = {"experimentName": "", "startIndex": 0, "sliceSize": 10, "colParams": [{"metric": x} for x in metrics]}
    query["allowedStatuses"] = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
    groups = get(address, "plugin/hparams/session_groups", query)["sessionGroups"]
    assert {group["name"] for group in groups} == RUNS
    for group in groups:
        backend = group["hparams"]["model.attention.backend"]
        assert group["name"] == f"{backend}/version_0"
        (session,) = group["sessions"]
        assert session["status"] == "STATUS_SUCCESS"
        assert 0 < session["endTimeSecs"] - session["startTimeSecs"] < 600
        final = {value["name"]["tag"]: value["value"] for value in group["metricValues"]}
        expected = json.loads((folder / "runs" / backend / "version_0" / "summary.json").read_text())
        del expected["status"]
        assert {tag: final[tag] for tag in expected} == pytest.approx(expected, rel=1e-6)


def test_figures_texts_and_the_layout_are_there(address: str) -> None:
    eventually(lambda: get(address, "plugin/images/tags"), lambda tags: set(tags) == RUNS)
    images = {run: set(tags) for run, tags in get(address, "plugin/images/tags").items()}
    both = {"attention_pattern", "val/loss_by_position", "val/perplexity_by_context"}
    assert images == {"dilated/version_0": both | {"val/branch_weights"}, "sdpa/version_0": both}
    texts = {run: set(tags) for run, tags in get(address, "plugin/text/tags").items()}
    assert texts == {run: {"recipe/text_summary", "environment/text_summary"} for run in RUNS}
    layout = get(address, "plugin/custom_scalars/layout")
    assert [category["title"] for category in layout["category"]] == list(LAYOUT)


@pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver")
def test_a_browser_shows_both_runs(folder: Path, address: str, tmp_path: Path) -> None:
    """Screenshots go to the folder that LONGNET_SCREENSHOTS names, else to the test's own."""
    eventually(lambda: get(address, "plugin/scalars/tags"), lambda tags: set(tags) == RUNS)
    shots = Path(os.environ.get("LONGNET_SCREENSHOTS", tmp_path))
    shots.mkdir(parents=True, exist_ok=True)
    with browser(tmp_path / "profile") as page:
        for tab, words in {
            "hparams": [*RUNS, *BACKENDS, "model.attention.backend", "TABLE VIEW", "train/loss", "val/loss"],
            "scalars": [*RUNS, "train/loss", "train/tokens_per_second", "tag: train/grad_norm"],
        }.items():
            page.get("about:blank")
            page.get(f"{address}#{tab}")
            text = eventually(lambda: page.execute_script(VISIBLE_TEXT), lambda text, words=words: has(text, words))
            assert has(text, words), f"{tab}: {[word for word in words if not has(text, [word])]} not in {text}"
            numbers = [f"{scalars_of(folder, backend)['train/loss'][6]:.4f}" for backend in BACKENDS]
            if tab == "hparams":
                assert has(text, numbers), f"{numbers} not in {text}"
            else:
                drawn = eventually(lambda: page.execute_script(DRAWN_CURVES), lambda count: count >= 2)
                assert drawn >= 2, "no curves of two runs were drawn"
            assert page.save_screenshot(str(shots / f"{tab}.png"))
            assert (shots / f"{tab}.png").stat().st_size > 20_000


WALK = """
function walk(node, visit) {
  if (['STYLE', 'SCRIPT', 'NOSCRIPT'].includes(node.tagName)) return;
  visit(node);
  if (node.shadowRoot) walk(node.shadowRoot, visit);
  for (const child of node.childNodes) walk(child, visit);
}
"""
VISIBLE_TEXT = (
    WALK
    + """
const words = [];
walk(document.body, node => { if (node.nodeType === 3) words.push(node.textContent.trim()); });
return words.filter(word => word).join(' ');
"""
)
DRAWN_CURVES = (
    WALK
    + """
let most = 0;
walk(document.body, node => {
  if (node.tagName && node.tagName.toLowerCase() === 'svg')
    most = Math.max(most, node.querySelectorAll('path[d^=M]').length);
});
return most;
"""
)


def has(text: str, words: list[str]) -> bool:
    """Whether the words are there; pages break long ones anywhere."""
    packed = "".join(text.split()).lower()
    return all("".join(word.split()).lower() in packed for word in words)


def browser(profile: Path) -> Any:
    """Chromium without a window and without anything that would reach for the network."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER or ""
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
                 "disable-background-networking", "disable-component-update", "disable-dev-shm-usage",
                 "window-size=1600,1200", f"user-data-dir={profile}"):  # fmt: skip
        options.add_argument(f"--{flag}")
    return webdriver.Chrome(options=options, service=Service(DRIVER))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere: no such directory"),
        (["--port", "70000"], "70000 is no port"),
        (["--port", "x"], "invalid int value"),
        (["--host", "no.such.host.invalid"], "does not start on no.such.host.invalid"),
    ],
)
def test_what_cannot_be_served_is_told(arguments: list[str], words: str, folder: Path) -> None:
    said = desk.longnet(folder, "board", *arguments, expect=2)
    assert words in said and "Traceback" not in said


def test_a_port_that_is_taken_is_told(folder: Path, address: str) -> None:
    port = urllib.parse.urlparse(address).port
    with pytest.raises(ValueError, match=f"does not start on localhost, port {port}"):
        board.start(folder / "runs", port=port)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "tgkill"), reason="the C library has no tgkill")
def test_a_signal_that_another_thread_takes_ends_it(folder: Path) -> None:
    process, url = served(folder)
    try:
        # Before any request: the threads of requests end with them.
        others = [thread for thread in Path(f"/proc/{process.pid}/task").iterdir() if int(thread.name) != process.pid]
        get(url, "plugin/scalars/tags")
        other = next(thread for thread in others if takes_interrupts(thread))
        assert ctypes.CDLL(None).tgkill(process.pid, int(other.name), signal.SIGINT) == 0
        assert process.wait(60) == 0
    finally:
        process.kill()


def takes_interrupts(thread: Path) -> bool:
    try:
        status = (thread / "status").read_text()
    except OSError:  # it has ended
        return False
    blocked = next(line for line in status.splitlines() if line.startswith("SigBlk:"))
    return not int(blocked.split()[1], 16) >> (signal.SIGINT - 1) & 1
