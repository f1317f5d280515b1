"""The study on two tiny rows: what it measures, and that it goes on where it was."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from longnet_kit import experiment, runs, sweep
from longnet_kit.model import Transformer
from longnet_kit.model.loss import token_losses
from tests.parallel import desk
from tests.tools.test_benchmarks import ROOT

ROWS = {
    "transformer_8": "attention: {backend: sdpa}",
    "longnet_4k_none": "attention: {backend: dilated, segment_lengths: [8, 32], dilation_rates: [1, 2]}",
}
ALONE = "trainer: {devices: 1, val_check_interval: 2}\nstrategy: {name: auto, sequence_parallel_size: 1}\n"


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tool, with two rows, of which one has two seeds, and lengths to match."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import study

    monkeypatch.chdir(tmp_path)
    desk.lay(tmp_path)
    Path("study").mkdir()
    for (row, attention), length in zip(ROWS.items(), (8, 32), strict=True):
        data = f"data: {{seq_len: {length}, batch_size: {32 // length}, eval_contexts: []}}"
        text = f"name: of_{row}\nextends: ../tiny.yaml\nmodel: {{{attention}}}\n{data}\n{ALONE}"
        Path(f"study/{row}.yaml").write_text(text)
    for name, value in {"FOLDER": Path("study"), "LENGTHS": (8, 16, 32), "WINDOWS": 3, "SUFFIX": 8}.items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(study, "SEEDS", {"longnet_4k_none": (1, 2)})
    monkeypatch.setattr(sys, "argv", ["study.py"])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return study


def results() -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in Path("study/results").glob("*.json")}


@pytest.mark.soak
def test_every_run_is_trained_tested_and_written_down_once(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert study.main() == 0
    found = results()
    assert set(found) == {"transformer_8-1", "longnet_4k_none-1", "longnet_4k_none-2"}
    assert found["longnet_4k_none-1"]["test"] != found["longnet_4k_none-2"]["test"]
    page = Path("study/RESULTS.md").read_text()
    for row, result in found.items():
        assert result["tokens"] == 6 * 32 and result["flops"] > 0 and len(result["curve"]) == 3
        assert list(result["test"]) == ["8", "16", "32"]
        assert list(result["blockwise"]) == (["16", "32"] if row == "transformer_8-1" else [])
        assert list(result["prompt"]) == (["0"] if row == "transformer_8-1" else ["0", "8", "24"])
    assert f"{math.exp(found['transformer_8-1']['test']['16']):.3f}" in page
    assert "±" in page and all(Path(f"study/{name}.png").is_file() for name in ("perplexity", "flops", "prompt"))
    shutil.rmtree("runs")
    stamps = {path: path.stat().st_mtime_ns for path in Path("study/results").iterdir()}
    monkeypatch.setattr(sweep, "sweep", lambda *_: pytest.fail("a row that is there is trained again"))
    assert study.main() == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in Path("study/results").iterdir()}


@pytest.mark.soak
def test_a_result_of_a_recipe_that_has_changed_does_not_count(
    study: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["study.py", "--rows", "transformer_8"]
    monkeypatch.setattr(sys, "argv", argv)
    assert study.main() == 0
    before, page = results()["transformer_8-1"], Path("study/RESULTS.md").read_text()
    path = Path("study/transformer_8.yaml")
    path.write_text(path.read_text().replace("name: of_transformer_8", "name: of_another_name"))
    monkeypatch.setattr(sys, "argv", [*argv, "--report"])
    assert study.main() == 0
    assert results()["transformer_8-1"] == before, "a name is no experiment"
    path.write_text(path.read_text() + "optimizer: {lr: 0.02}\n")
    assert study.main() == 0
    assert results()["transformer_8-1"] == before and "left out: transformer_8, seed 1" in capsys.readouterr().out
    assert Path("study/RESULTS.md").read_text() == page, "with no result left, the page stays"
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match="trained under another recipe"):
        study.main()
    shutil.rmtree("runs")
    assert study.main() == 0
    after = results()["transformer_8-1"]
    assert after["experiment"] != before["experiment"] and after["test"] != before["test"]


def test_elsewhere_it_says_where_to_run_it(study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(SystemExit, match="study has no recipes; run this from"):
        study.main()


@pytest.mark.soak
def test_what_is_measured_is_what_the_test_split_gives(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against `longnet test` of the same run at that length, on all of the split."""
    monkeypatch.setattr(study, "WINDOWS", 10**6)
    monkeypatch.setattr(sys, "argv", ["study.py", "--rows", "transformer_8"])
    assert study.main() == 0
    result = results()["transformer_8-1"]
    directory = runs.find(Path("runs/study_transformer_8_1_sweep_cell"))
    longer = ["data.seq_len=32", "data.eval_contexts=[8,16,32]"]
    tested = experiment.evaluate(directory, longer, which="test")
    for length in (8, 16, 32):
        assert math.exp(result["test"][str(length)]) == pytest.approx(tested[f"test/perplexity@{length}"], rel=1e-5)


@torch.inference_mode()
def test_blockwise_no_token_sees_further_than_the_trained_length(study: Any) -> None:
    network = Transformer(19, dim=8, layers=2, heads=2, ffn_dim=8, seq_len=8, attention={"backend": "sdpa"})
    text = torch.randint(19, (2, 1, 32))
    losses = []
    for start in range(0, 32, 4):  # each half window after the half before it
        first = max(0, start - 4)
        hidden = network.hidden(text[0][:, first : start + 4])[:, start - first :]
        found = token_losses(hidden, network.embedding.weight, text[1][:, start : start + 4])
        losses.append(found.mean().item())
    given = study._blockwise_loss(network, [(text[0], text[1])], 32, 8)
    assert given == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    given = study._suffix_loss(network, [(text[0], text[1])], 16)
    expected = token_losses(network.hidden(text[0][:, -16:]), network.embedding.weight, text[1][:, -16:])[:, -8:]
    assert given == pytest.approx(expected.mean().item(), rel=1e-6)


def test_a_row_that_is_not_there_is_named(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["study.py", "--rows", "transformer_9"])
    with pytest.raises(SystemExit, match=r"--rows transformer_9: no such recipe in study; there are"):
        study.main()
