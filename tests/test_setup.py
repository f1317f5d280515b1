"""The launchers in tools/, in a copy, with an interpreter whose `venv` and `pip` only write down what they did."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
INPUTS = ("setup.cfg", "pyproject.toml")

# Stands in for python3. LOG receives a line for each environment made and for each run of pip; pip waits while HOLD
# exists, and fails while BROKEN exists. The rest is left to the real interpreter.
STUB = """#!/bin/sh
log={folder}/log
case "$1 $2" in
    "-m venv")
        echo "venv" >>"$log"
        mkdir -p "$3/bin" "$3/lib"
        ln -s "$0" "$3/bin/python" ;;
    "-m pip")
        echo "pip" >>"$log"
        echo "$$" >{folder}/pid && mv {folder}/pid {folder}/pip_pid
        while [ -e {folder}/hold ]; do sleep 0.02; done
        [ ! -e {folder}/broken ] || {{ echo "no such version" >&2; exit 1; }}
        printf '#!/bin/sh\\nprintf "%%s\\\\n" "$PWD" "$@"\\nexit 7\\n' >"$(dirname "$0")/longnet"
        chmod +x "$(dirname "$0")/longnet" ;;
    *) exec {python} "$@" ;;
esac
"""
SET_UP = ["venv", "pip", "pip"]


def _as_on_a_terminal() -> None:
    """A process in the background has signals ignored that end one on a terminal."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Clone:
    """A copy of tools/ with what it reads, and a stub for its interpreter."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "a clone"
        shutil.copytree(ROOT / "tools", self.root / "tools")
        for name in INPUTS:
            shutil.copy(ROOT / name, self.root / name)
        self.python = folder / "python3"
        self.python.write_text(STUB.format(folder=folder, python=sys.executable))
        self.python.chmod(0o755)
        self.elsewhere = folder / "else where"
        self.elsewhere.mkdir()

    @property
    def log(self) -> list[str]:
        """What was made and installed so far."""
        return (self.folder / "log").read_text().split() if (self.folder / "log").exists() else []

    def environment(self, **extra: str) -> dict[str, str]:
        return {**os.environ, "LONGNET_PYTHON": str(self.python), **extra}

    def start(self, *arguments: str, launcher: Path | None = None, **extra: str) -> subprocess.Popen[str]:
        """Start tools/longnet, away from the clone."""
        return subprocess.Popen(
            [str(launcher or self.root / "tools" / "longnet"), *arguments],
            cwd=self.elsewhere,
            env=self.environment(**extra),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=_as_on_a_terminal,
        )

    def run(self, *arguments: str, launcher: Path | None = None, **extra: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of tools/longnet."""
        process = self.start(*arguments, launcher=launcher, **extra)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def ran(self, *arguments: str) -> tuple[int, str]:
        """What `run` gives when the stub of `longnet` was reached: its own exit code, its directory and arguments."""
        return 7, "".join(f"{line}\n" for line in (self.elsewhere, *arguments))


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_first_start_sets_up_and_later_ones_only_run(clone: Clone) -> None:
    code, out, err = clone.run("fit", "two words", "")
    assert (code, out) == clone.ran("fit", "two words", "")
    assert "setting up" in err
    assert clone.log == SET_UP
    assert clone.run("list") == (*clone.ran("list"), "")
    assert clone.log == SET_UP


def test_a_later_start_costs_under_a_fifth_of_a_second(clone: Clone, capsys: pytest.CaptureFixture[str]) -> None:
    clone.run()
    costs = []
    for _ in range(5):
        begin = time.perf_counter()
        assert clone.run()[0] == 7
        costs.append(time.perf_counter() - begin)
    with capsys.disabled():
        print(f"\n[a later start: {min(costs):.3f} s]", end=" ")
    assert min(costs) < 0.2


def test_a_link_to_the_launcher_works(clone: Clone) -> None:
    link = clone.folder / "bin" / "ln"
    link.parent.mkdir()
    link.symlink_to(os.path.relpath(clone.root / "tools" / "longnet", link.parent))
    code, out, _ = clone.run("list", launcher=link)
    assert (code, out) == clone.ran("list")
    assert (clone.root / ".venv" / "bin" / "longnet").exists()


def test_two_first_starts_set_up_once(clone: Clone) -> None:
    (clone.folder / "hold").touch()
    first = clone.start("1")
    wait_for(lambda: "pip" in clone.log)
    second = clone.start("2")
    assert second.stderr is not None
    assert "waiting for it" in second.stderr.readline()
    (clone.folder / "hold").unlink()
    for process, argument in ((first, "1"), (second, "2")):
        out, _ = process.communicate(timeout=60)
        assert (process.returncode, out) == clone.ran(argument)
    assert clone.log == SET_UP


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_an_interrupted_set_up_is_made_anew(clone: Clone, number: signal.Signals) -> None:
    (clone.folder / "hold").touch()
    process = clone.start()
    wait_for(lambda: (clone.folder / "pip_pid").exists())
    left_over = clone.root / ".venv" / "lib" / "half_a_package.py"
    left_over.touch()
    pip = int((clone.folder / "pip_pid").read_text())
    if number == signal.SIGKILL:
        os.killpg(process.pid, number)  # a crash of the machine: nothing can clean up
    else:
        process.send_signal(number)  # to the launcher alone: it must end pip
    process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    wait_for(lambda: not _alive(pip))
    (clone.folder / "hold").unlink()
    code, out, err = clone.run("list")
    assert (code, out) == clone.ran("list")
    assert "waiting" not in err
    assert clone.log == ["venv", "pip", *SET_UP]
    assert not left_over.exists()


def test_an_orphaned_pip_keeps_the_next_start_waiting(clone: Clone) -> None:
    (clone.folder / "hold").touch()
    process = clone.start()
    wait_for(lambda: (clone.folder / "pip_pid").exists())
    process.kill()
    process.wait()
    second = clone.start("list")
    assert second.stderr is not None
    assert "waiting for it" in second.stderr.readline()
    assert clone.log == ["venv", "pip"]
    (clone.folder / "hold").unlink()
    assert (second.communicate(timeout=60)[0], second.returncode) == (clone.ran("list")[1], 7)
    assert clone.log == ["venv", "pip", *SET_UP]
    process.communicate()


def test_a_failing_pip_ends_with_its_message_and_is_tried_again(clone: Clone) -> None:
    (clone.folder / "broken").touch()
    for _ in range(2):
        code, out, err = clone.run()
        assert (code, out) == (1, "")
        assert "no such version" in err
        assert "could not install" in err
    (clone.folder / "broken").unlink()
    assert clone.run()[0] == 7


@pytest.mark.parametrize("name", [*INPUTS, "tools/constraints.txt", "tools/setup.sh"])
def test_changed_requirements_are_installed_in_place(clone: Clone, name: str) -> None:
    clone.run()
    with (clone.root / name).open("a") as file:
        file.write("# changed\n")
    code, _, err = clone.run()
    assert code == 7
    assert "up to date" in err
    assert clone.log == [*SET_UP, "pip", "pip"]
    assert clone.run()[2] == ""


def test_an_interrupted_update_is_made_anew(clone: Clone) -> None:
    clone.run()
    with (clone.root / "setup.cfg").open("a") as file:
        file.write("# changed\n")
    (clone.folder / "broken").touch()
    assert clone.run()[0] == 1
    (clone.folder / "broken").unlink()
    assert clone.run()[0] == 7
    assert clone.log == [*SET_UP, "pip", *SET_UP]


def test_a_moved_clone_and_another_interpreter_are_made_anew(clone: Clone) -> None:
    clone.run()
    clone.root = clone.root.rename(clone.folder / "moved")
    assert clone.run()[0] == 7
    assert clone.log == SET_UP * 2
    other = clone.folder / "other"
    shutil.copy(clone.python, other)
    assert clone.run(LONGNET_PYTHON=str(other))[0] == 7
    assert clone.log == SET_UP * 3
    assert clone.run(LONGNET_PYTHON="")[0] == 7, "without a wish, what is there will do"
    assert clone.log == SET_UP * 3
    (clone.folder / "bin").mkdir()
    other.rename(clone.folder / "bin" / "python3")  # the link in .venv leads nowhere now
    path = f"{clone.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    assert clone.run(LONGNET_PYTHON="", PATH=path)[0] == 7
    assert clone.log == SET_UP * 4


def test_an_environment_of_other_making_is_left_alone(clone: Clone) -> None:
    theirs = clone.root / ".venv" / "pyvenv.cfg"
    theirs.parent.mkdir()
    theirs.write_text("mine")
    code, _, err = clone.run()
    assert code == 2
    assert "delete it" in err
    assert clone.log == []
    assert [p.name for p in theirs.parent.iterdir()] == ["pyvenv.cfg"]


@pytest.mark.parametrize(
    ("answer", "told"),
    [("echo is 3.9", "is 3.9"), ("exit 127", "does not run"), ("echo has no venv module", "has no venv module")],
)
def test_an_unfit_interpreter_is_refused(clone: Clone, answer: str, told: str) -> None:
    clone.python.write_text(f"#!/bin/sh\n{answer}\n")
    code, out, err = clone.run()
    assert (code, out) == (2, "")
    assert f"{clone.python} {told}" in err
    assert "3.11" in err
    assert "LONGNET_PYTHON=" in err
    assert not (clone.root / ".venv").exists()


def test_the_first_fit_interpreter_is_taken(clone: Clone) -> None:
    bin = clone.folder / "bin"
    bin.mkdir()
    for name, text in (("python3", "#!/bin/sh\necho is 3.9\n"), ("python3.13", "#!/bin/sh\nexit 127\n")):
        (bin / name).write_text(text)
        (bin / name).chmod(0o755)
    shutil.copy(clone.python, bin / "python3.12")
    path = f"{bin}{os.pathsep}{os.environ['PATH']}"
    assert clone.run(LONGNET_PYTHON="", PATH=path)[0] == 7
    assert (clone.root / ".venv" / ".longnet_kit" / "made").read_text().splitlines()[0] == "python3.12"


def test_pytest_receives_the_arguments_of_the_test_launcher(clone: Clone) -> None:
    code, _, _ = clone.run()
    assert code == 7
    tests = clone.root / "tests"
    tests.mkdir()
    (tests / "test_one.py").write_text("def test_a(): pass\ndef test_b(): assert False\n")
    launcher = clone.root / "tools" / "test"
    code, out, _ = clone.run("tests/test_one.py", "-k", "a and not b", launcher=launcher)
    assert code == 0
    assert "1 passed, 1 deselected" in out.splitlines()[-1]
    code, out, _ = clone.run("tests/test_one.py", launcher=launcher)
    assert code == 1
    assert "1 failed, 1 passed" in out.splitlines()[-1]


@pytest.mark.parametrize("broken", ["", "ruff", "basedpyright", "python"])
def test_each_check_counts(clone: Clone, broken: str) -> None:
    clone.run()
    bin = clone.root / ".venv" / "bin"
    for name, tool in (("ruff", bin / "ruff"), ("basedpyright", bin / "basedpyright"), ("python", clone.python)):
        tool.write_text(f"#!/bin/sh\necho '{name} was here'\nexit {3 if name == broken else 0}\n")
        tool.chmod(0o755)
    code, out, err = clone.run(launcher=clone.root / "tools" / "test")
    assert code == {"": 0, "python": 3}.get(broken, 1)
    assert out.splitlines()[-1] == "python was here", "the tests run and end the output, whatever the checks say"
    assert ("was here" in err) == (broken in ("ruff", "basedpyright")), "a check that passes is quiet"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")  # an unreaped zombie has ended
