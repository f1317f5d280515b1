"""Whose digits a network names: told apart where it names its own key's, another's, or none that stands in the text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.parallel import desk
from tests.tools.test_benchmarks import ROOT

TEXT = b" Pass key B is 48. Pass key A is 73. Pass key B? 48. Here. Pass key A? 73. Pass key C is 91. Pass key C? 91."


@pytest.mark.parametrize(
    ("digit", "right", "another"),
    [
        ("4", [True, False, False], [False, True, True]),
        ("7", [False, True, False], [True, False, True]),
        ("9", [False, False, True], [False, False, False]),
        ("0", [False] * 3, [False] * 3),
    ],
)
def test_each_answer_is_held_against_the_keys_before_it(
    digit: str, right: list[bool], another: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))

    import passkey_digits

    answers = passkey_digits.named_digits(TEXT, [ord(digit)] * len(TEXT))
    assert [distance for distance, *_ in answers] == [34, 38, 16]
    assert [answer[1] for answer in answers] == right
    assert [answer[2] for answer in answers] == another
    assert [answer[3] for answer in answers] == [1, 1, 2]


@pytest.mark.soak
def test_the_tool_reads_a_run(tmp_path: Path) -> None:
    small = ["trainer.max_steps=1", "data.seq_len=256", "data.distances=[32,64]", "data.keys=4", "data.val_examples=2",
             "model.layers=1", "model.attention.segment_lengths=[32,64,256]"]  # fmt: skip
    desk.longnet(tmp_path, "fit", "tasks/passkey_longnet", *small)
    tool = [sys.executable, str(ROOT / "tools" / "passkey_digits.py"), "runs/passkey_longnet", "--examples", "4"]
    lines = subprocess.check_output(tool, cwd=tmp_path, env=desk.environment(), text=True).splitlines()
    groups = {int(line.split()[0]): int(line.split()[1]) for line in lines[1:]}
    assert set(groups) == {32, 64} and sum(groups.values()) == 4 * 4
