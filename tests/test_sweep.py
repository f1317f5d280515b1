"""A grid of runs, however it is interrupted."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import rich
from rich.console import Console

from longnet_kit import recipe, resume, run_lock, runs, sweep, sweep_child, sweep_grid, sweep_view
from tests.parallel import desk

pytestmark = pytest.mark.timeout(300)
needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")

HURDLES = """
import os
import sys
import time
from pathlib import Path

from longnet_kit import attention


class Hurdle(attention.AttentionBackend):
    def __init__(self):
        super().__init__()
        self.inner = attention.build({"backend": "sdpa"})

    def forward(self, q, k, v, causal=True, key_padding_mask=None):
        if Path("slow").exists():
            time.sleep(0.3)
        while Path("held").exists():
            time.sleep(0.05)
        return self.inner(q, k, v, causal, key_padding_mask)


class Broken(Hurdle):
    def forward(self, q, k, v, causal=True, key_padding_mask=None):
        raise RuntimeError("a bolt is loose")


class Vanishing(Hurdle):
    def forward(self, q, k, v, causal=True, key_padding_mask=None):
        os._exit(0)


while Path("late").exists() and sys.argv[0].endswith("cli.py"):
    time.sleep(0.1)
attention.register("hurdle")(Hurdle)
attention.register("broken")(Broken)
attention.register("vanishing")(Vanishing)
"""
COMMAND = """
import sys
from longnet_kit import sweep, sweep_child
from longnet_kit.report import compare
compare.compare = lambda paths: "the table of " + " ".join(paths)
try:
    sys.exit(sweep.sweep(sys.argv[1], sys.argv[2:]))
except sweep_child.Ended as end:
    sys.exit(128 + end.signum)
"""
PLUGGED = ["imports=[hurdles]", "data.eval_contexts=[8]"]
ALONE = ["trainer.devices=1", "strategy.name=auto", *PLUGGED]
GRID = [*ALONE, "data.seq_len=16,32", "model.attention.backend=sdpa,hurdle"]
NAMES = [f"backend-{backend}+seq_len-{length}" for length in (16, 32) for backend in ("sdpa", "hurdle")]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a recipe, a text and a plug-in."""
    monkeypatch.chdir(tmp_path)
    desk.lay(tmp_path)
    Path("hurdles.py").write_text(HURDLES)
    Path("command.py").write_text(COMMAND)
    return tmp_path


class Sweep:
    """A sweep in a process of its own, its output in a file."""

    def __init__(self, *items: str, path: str = "tiny.yaml") -> None:
        self.output = Path(f"output_{time.monotonic_ns()}.txt")
        with self.output.open("w") as file:
            command = [sys.executable, "command.py", path, *items]
            self.process = subprocess.Popen(
                command, env=desk.environment(), stdout=file, stderr=subprocess.STDOUT, process_group=0,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # as on a terminal
            )  # fmt: skip

    def text(self) -> str:
        return self.output.read_text()

    def end(self, expect: int) -> str:
        code = self.process.wait(timeout=200)
        assert code == expect, f"exit code {code}\n{self.text()}"
        return self.text()

    def wait_for(self, true: Callable[[], object]) -> None:
        began = time.monotonic()
        while not true():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() - began < 100, f"it did not happen\n{self.text()}"
            time.sleep(0.05)


@pytest.fixture
def start() -> Iterator[Callable[..., Sweep]]:
    started: list[Sweep] = []
    yield lambda *items, **where: started.append(Sweep(*items, **where)) or started[-1]
    for one in started:
        one.process.kill()
        one.process.wait()
    for pid in pids():
        os.kill(pid, signal.SIGKILL)


def pids() -> list[int]:
    """The processes that train in this working directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            ours = entry.joinpath("cwd").samefile(".") and b"longnet_kit.cli" in entry.joinpath("cmdline").read_bytes()
        except OSError:
            continue
        found += [int(entry.name)] if ours else []
    return found


def run_of(name: str) -> Path:
    return Path(f"runs/tiny_sweep_{name}/version_0")


def log_of(name: str) -> str:
    return Path(f"runs/tiny_sweep/{name}.log").read_text()


def steps(run: Path) -> list[int]:
    with (run / "metrics.csv").open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row.get("train/loss")]


def stamps(run: Path) -> list[tuple[Path, int]]:
    return sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))


def assert_complete(names: list[str]) -> None:
    """Each cell has one run directory, and in it a whole run."""
    assert {path.name for path in Path("runs").iterdir()} == {
        "tiny_sweep",
        *(run_of(name).parent.name for name in names),
    }
    for name in names:
        assert [path.name for path in run_of(name).parent.iterdir()] == ["version_0"]
        assert runs.read_summary(run_of(name))["status"] == "finished"
        assert steps(run_of(name)) == [2, 4, 6]
        assert not (run_of(name) / run_lock.LOCK).exists()


@needs_proc
@pytest.mark.parametrize("how", ["all processes", "the sweep alone"])
@pytest.mark.soak
def test_a_killed_sweep_goes_on(how: str, start: Callable[..., Sweep]) -> None:
    Path("slow").touch()
    killed, second = start(*GRID), run_of(NAMES[1])
    killed.wait_for(lambda: runs.checkpoints(second))
    before = stamps(run_of(NAMES[0]))
    orphans = pids()
    if how == "the sweep alone":
        Path("held").touch()
    os.killpg(killed.process.pid, signal.SIGKILL)
    killed.process.wait()
    assert len(orphans) == 1 and run_lock.holder(second).startswith(f"process {orphans[0]} on ")
    if how == "all processes":
        os.kill(orphans[0], signal.SIGKILL)
        Path("slow").unlink()
    again = start(*GRID)
    if how == "the sweep alone":
        again.wait_for(lambda: "waiting for its end" in again.text())
        Path("held").unlink()
        Path("slow").unlink()
    out = again.end(0)
    assert_complete(NAMES)
    assert stamps(run_of(NAMES[0])) == before
    assert "[1/4] seq_len=16 backend=sdpa: finished before, val/loss " in out
    attempts = {name: log_of(name).count("longnet_kit.cli fit") for name in NAMES}
    if how == "all processes":
        assert re.search(r"\[2/4\] seq_len=16 backend=hurdle: goes on from step [24]\n", out)
        assert attempts == dict.fromkeys(NAMES, 1) | {NAMES[1]: 2}
    else:
        assert f"[2/4] seq_len=16 backend=hurdle: another run trains it (process {orphans[0]} on " in out
        assert "[2/4] seq_len=16 backend=hurdle: finished meanwhile, val/loss " in out
        assert attempts == dict.fromkeys(NAMES, 1)
    assert re.search(r"\[4/4\] seq_len=32 backend=hurdle: finished in \d+ s, val/loss \d\.\d{3}\n", out)
    assert out.endswith("4 of 4 runs finished\n\nthe table of " + " ".join(str(run_of(name)) for name in NAMES) + "\n")
    done = {name: stamps(run_of(name)) for name in NAMES}
    out = start(*GRID).end(0)
    assert out.count("finished before") == 4
    assert {name: stamps(run_of(name)) for name in NAMES} == done


@needs_proc
@pytest.mark.soak
def test_a_run_that_outlives_its_sweep_has_its_cell_before_it_has_a_directory(start: Callable[..., Sweep]) -> None:
    Path("late").touch()
    killed = start(*ALONE, "model.dim=16,32")
    killed.wait_for(pids)
    killed.process.kill()
    killed.process.wait()
    again = start(*ALONE, "model.dim=16,32")
    again.wait_for(lambda: "dim=16: another run trains it (another process, log " in again.text())
    assert not run_of("dim-16").exists() and len(pids()) == 1
    Path("late").unlink()
    assert "dim=16: finished meanwhile" in again.end(0)
    assert_complete(["dim-16", "dim-32"])
    assert log_of("dim-16").count("longnet_kit.cli fit") == 1


@pytest.mark.soak
def test_a_change_to_the_recipe_reaches_no_run_of_a_sweep_that_has_started(start: Callable[..., Sweep]) -> None:
    """The recipe is in a folder of its own, its plug-in beside it; even the folder of logs may go meanwhile."""
    Path("slow").touch()
    Path("elsewhere").mkdir()
    for name in ("tiny.yaml", "hurdles.py"):
        Path(name).rename(Path("elsewhere") / name)
    items = ["data.paths=[text.txt]", *ALONE, "model.attention.backend=hurdle,sdpa"]
    sweeping = start(*items, path="elsewhere/tiny.yaml")
    sweeping.wait_for(lambda: runs.checkpoints(run_of("backend-hurdle")))
    changed = Path("elsewhere/tiny.yaml").read_text().replace("lr: 1.0e-2", "lr: 3.0e-2")
    Path("elsewhere/tiny.yaml").write_text(changed)
    shutil.rmtree("runs/tiny_sweep")
    Path("slow").unlink()
    assert "2 of 2 runs finished\n" in sweeping.end(0)
    assert_complete(["backend-hurdle", "backend-sdpa"])
    for name in ("backend-hurdle", "backend-sdpa"):
        assert recipe.load_saved(run_of(name)).optimizer.lr == 0.01


@pytest.mark.soak
def test_a_run_without_its_recipe_is_not_thrown_away(start: Callable[..., Sweep]) -> None:
    start(*ALONE, "model.dim=16,32").end(0)
    (run_of("dim-16") / "recipe.yaml").unlink()
    before = stamps(run_of("dim-16"))
    Path("runs/tiny_sweep_dim-32/version_1").mkdir()  # killed before anything was in it
    out = start(*ALONE, "model.dim=16,32").end(1)
    assert "dim-16/version_0 has no recipe.yaml, but checkpoints, events.out" in out and "1 failed: dim=16\n" in out
    assert stamps(run_of("dim-16")) == before
    assert not Path("runs/tiny_sweep_dim-16/version_1").exists()


@pytest.mark.soak
def test_a_run_that_stops_or_vanishes_is_not_called_finished(start: Callable[..., Sweep]) -> None:
    Path("slow").touch()
    out = start(*ALONE, "trainer.max_time='00:00:00:01'", "model.attention.backend=hurdle,vanishing").end(1)
    assert "backend=hurdle: stopped before its last step, after " in out
    assert "backend=vanishing: failed (exit code 0); its log is runs/tiny_sweep/backend-vanishing.log" in out
    assert "0 of 2 runs finished, 1 stopped: backend=hurdle, 1 failed: backend=vanishing\n" in out
    assert "the table of " in out


@needs_proc
@pytest.mark.parametrize(
    ("number", "devices"),
    [
        (signal.SIGINT, 1),
        (signal.SIGTERM, 2),
        pytest.param(signal.SIGUSR1, 1, marks=pytest.mark.soak),
        pytest.param(signal.SIGHUP, 1, marks=pytest.mark.soak),
    ],
)
def test_a_signal_ends_the_run_and_the_sweep(number: signal.Signals, devices: int, start: Callable[..., Sweep]) -> None:
    Path("slow").touch()
    more = [f"trainer.devices={devices}", f"strategy.name={'auto' if devices == 1 else 'ddp'}"]
    stopped = start(*PLUGGED, *more, "model.attention.backend=hurdle,sdpa")
    stopped.wait_for(lambda: runs.checkpoints(run_of("backend-hurdle")))
    assert len(pids()) == devices
    os.kill(stopped.process.pid, number)
    out = stopped.end(128 + number)
    assert f"{number.name}: 0 of 2 runs finished; the same command goes on from here" in out
    assert "Traceback" not in out and "the table" not in out
    assert pids() == []
    run_lock.check_free(run_of("backend-hurdle"))
    assert not run_of("backend-sdpa").exists()


def test_a_closed_terminal_may_send_its_signal_twice_and_the_run_still_saves(folder: Path) -> None:
    """The system sends SIGHUP to the process group, and the shell to its jobs."""
    program = """if True:
        import pathlib, signal, time
        asked = []
        signal.signal(signal.SIGHUP, lambda *_: asked.append(1))
        pathlib.Path("ready").touch()
        while not asked:
            time.sleep(0.01)
        time.sleep(0.5)
        pathlib.Path("saved").touch()
    """
    with sweep_child.Signals() as received, open("log", "wb") as log:
        child = sweep_child.Child([sys.executable, "-c", program], log)
        while not Path("ready").exists():
            received.pause()
        os.kill(os.getpid(), signal.SIGHUP)
        second = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGHUP))
        second.start()
        with pytest.raises(sweep_child.Ended) as ended:
            received.pause()
        child.end(received)
        second.join()
    assert ended.value.signum == signal.SIGHUP
    assert Path("saved").exists()


@pytest.mark.soak
def test_a_run_that_fails_stops_no_other(start: Callable[..., Sweep]) -> None:
    out = start(*ALONE, "model.attention.backend=sdpa,broken,hurdle").end(1)
    log = Path("runs/tiny_sweep/backend-broken.log")
    assert f"[2/3] backend=broken: failed (exit code 1); its log is {log}\n    " in out
    assert "    RuntimeError: a bolt is loose\n" in out and "Traceback" in log.read_text()
    assert "2 of 3 runs finished, 1 failed: backend=broken\n" in out
    assert runs.read_summary(run_of("backend-broken"))["status"] == "failed"
    for name in ("backend-sdpa", "backend-hurdle"):
        assert runs.read_summary(run_of(name))["status"] == "finished"


@pytest.mark.soak
def test_a_damaged_summary_stops_no_other_run(start: Callable[..., Sweep]) -> None:
    items = ["trainer.devices=1", "strategy.name=auto", "data.eval_contexts=[8]", "model.dim=16,32"]
    for run in sweep._runs("tiny.yaml", sweep_grid.parse(items)):
        recipe.save(run.recipe, runs.claim(run.recipe.name) / runs.RECIPE)
    folder, text = (run_of(f"dim-{dim}") / runs.SUMMARY for dim in (16, 32))
    folder.mkdir()
    text.write_bytes(b'{"status": "\xff"}')
    out = start(*items).end(1)
    assert "1 of 2 runs finished, 1 failed: " in out and "summary.json is a directory" in out and "move it away" in out
    assert "Traceback" not in out and runs.read_summary(text.parent)["status"] == "finished"


@pytest.mark.soak
def test_more_steps_train_finished_runs_on(start: Callable[..., Sweep]) -> None:
    """Here the only one, on two devices: a run starts its own processes."""
    items = [*PLUGGED, "data.batch_size=2", "strategy={name: ddp}", "optimizer.schedule=constant"]
    assert "[1/1] the only cell: finished in" in start(*items, "trainer.max_steps=4").end(0)
    assert "[1/1] the only cell: goes on from step 4\n" in start(*items).end(0)
    assert_complete(["cell"])


def test_cells_that_cannot_be_run_are_told_of_before_anything_starts() -> None:
    with pytest.raises(ValueError, match=r"^3 of 4 runs cannot be, so none was started") as caught:
        sweep.sweep("tiny.yaml", ["model.heads=2,3", "model.attention.backend=sdpa,sdqa"])
    lines = str(caught.value).splitlines()
    assert [line.strip().partition(": ")[0] for line in lines[1:] if line.startswith("  heads")] == [
        "heads=2 backend=sdqa",
        "heads=3 backend=sdpa",
        "heads=3 backend=sdqa",
    ]
    assert "did you mean 'sdpa'" in str(caught.value) and "dim must be a multiple of heads" in str(caught.value)
    assert not Path("runs").exists()


def test_what_is_wrong_with_every_cell_is_told_once() -> None:
    with pytest.raises(ValueError, match=r"^model\.heds \(on the command line\): unknown key") as caught:
        sweep.sweep("tiny.yaml", ["model.dim=16,32", "model.heds=2"])
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no recipe 'tinny.yaml'"):
        sweep.sweep("tinny.yaml", ["model.dim=16,32"])
    with pytest.raises(ValueError, match="leaves no room for the cells; give the sweep a name of at most 84"):
        sweep.sweep("tiny.yaml", ["model.dim=16,32", "name=" + "n" * 90])
    assert not Path("runs").exists()


def family() -> None:
    """Two recipes in a folder, over tiny.yaml."""
    Path("family").mkdir()
    for name in ("b", "a"):
        Path(f"family/{name}.yaml").write_text(f"extends: ../tiny.yaml\nname: the_{name}\n")


def test_the_recipes_of_a_folder_share_the_grid() -> None:
    family()
    found = sweep._of_all(sweep._recipes(["family", "tiny.yaml"]), sweep_grid.parse(["model.dim=16,32"]))
    assert [run.cell.label for run in found] == [f"{stem} dim={n}" for stem in ("a", "b", "tiny") for n in (16, 32)]
    assert [run.recipe.name for run in found[::2]] == [f"{x}_sweep_dim-16" for x in ("the_a", "the_b", "tiny")]
    assert [run.recipe.model.dim for run in found] == [16, 32] * 3
    assert found[0].log == Path("runs/the_a_sweep/dim-16.log")
    alone = sweep._of_all(["family/a.yaml"], sweep_grid.parse([]))
    assert [run.cell.label for run in alone] == ["the only cell"]


def test_the_runs_of_several_recipes_are_compared_together(start: Callable[..., Sweep]) -> None:
    family()
    out = start(*ALONE, "trainer.max_steps=2", path="family").end(0)
    assert "[1/2] a: finished in" in out and "[2/2] b: finished in" in out and "2 of 2 runs finished" in out
    assert "the table of runs/the_a_sweep_cell/version_0 runs/the_b_sweep_cell/version_0" in out


def test_recipes_that_cannot_be_swept_together_are_told_of_at_once() -> None:
    family()
    Path("family/c.yaml").write_text("extends: ../tiny.yaml\nname: the_a\n")
    Path("family/d.yaml").write_text("extends: ../tiny.yaml\nname: d\nmodel: {heds: 2}\n")
    with pytest.raises(
        ValueError, match=r"^2 problems\n  family/a\.yaml and family/c\.yaml have the same name"
    ) as caught:
        sweep.sweep("family", [])
    assert "model.heds" in str(caught.value)
    with pytest.raises(ValueError, match="name: got 'mine' for 2 recipes; each has a name of its own"):
        sweep.sweep(["family/a.yaml", "family/b.yaml"], ["name=mine"])
    Path("empty").mkdir()
    with pytest.raises(ValueError, match="empty is a folder without recipes"):
        sweep.sweep("empty", [])
    assert not Path("runs").exists()


def test_runs_of_another_recipe_are_not_gone_on_with() -> None:
    """Nothing is started, the other cell neither."""
    run = runs.claim("tiny_sweep_dim-16")
    recipe.save(recipe.load("tiny.yaml", ["optimizer.lr=0.5"]), run / runs.RECIPE)
    with pytest.raises(
        ValueError, match=r"1 of 2 runs.*\n  dim=16: .*optimizer\.lr.*or name the sweep otherwise, name="
    ):
        sweep.sweep("tiny.yaml", ["model.dim=16,32"])


def test_the_time_left_is_that_of_the_runs_so_far() -> None:
    places = [resume.Place(is_finished=True), *[resume.Place()] * 3]
    some = sweep._Sweep([SimpleNamespace(place=lambda p=p: p) for p in places], None, None)  # type: ignore[arg-type]
    some._number = 2
    assert some._left(1.0) is None
    some._seconds = [10.0, 20.0]
    assert some._left(5.0) == 10 + 2 * 15
    assert some._left(50.0) == 2 * 15
    some._number = 4
    assert some._left(5.0) == 10


def test_lines_keep_their_distance(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(sweep_view.time, "monotonic", lambda: clock.now)
    with sweep_view.view(4) as view:
        view.begin(2)
        for clock.now in range(25):
            view.update("dim=16", f"step {clock.now}/99  loss 3.2", 61.0)
        view.update("dim=16", "next  longnet test", None)
    assert capsys.readouterr().out.splitlines() == [
        "[2/4] step 10/99  loss 3.2; the sweep has 0:01:01 left",
        "[2/4] step 20/99  loss 3.2; the sweep has 0:01:01 left",
    ]


def test_a_terminal_gets_one_live_view(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(rich, "_console", Console(file=screen, force_terminal=True, width=80))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with sweep_view.view(4) as view:
        view.begin(3)
        view.say("[3/4] dim=16: started")
        view.update("dim=16", "step 40/100  loss 3.2 [bold]" + "x" * 80, 61.0)
        view._live.refresh()  # type: ignore[attr-defined]
        shown = screen.getvalue()
    assert "[3/4] dim=16: started" in shown
    assert "2/4 runs" in shown and "the sweep has 0:01:01 left" in shown
    assert "dim=16  step 40/100  loss 3.2 [bold]xxx" in shown
    assert "4/4 runs" in screen.getvalue()[len(shown) :]
