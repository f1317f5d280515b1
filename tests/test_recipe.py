"""Recipes: which layer wins, what is read from YAML, what comes back from a file, and that the shipped ones work."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from longnet_kit import model, recipe, recipe_files, recipe_schema, shipped
from longnet_kit.recipe import Recipe, RecipeError

SHIPPED = shipped.names()
PAPER = [name for name in SHIPPED if name.startswith("paper/")]
SMALLEST = "name: x\ntrainer: {max_steps: 5}\n"


def write(folder: Path, text: str, name: str = "r.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def load_text(folder: Path, text: str, *overrides: str) -> Recipe:
    return recipe.load(write(folder, text), overrides)


def refusal(path: Path | str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe.load(path, overrides)
    return str(caught.value)


# --- the shipped ones


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_loads_and_says_what_it_is(name: str) -> None:
    r = recipe.load(name)
    assert r.description
    assert "\n" not in r.description
    assert len(r.description) <= 100
    assert not r.notes
    assert recipe.load(shipped.find(name)) == r
    own = yaml.safe_load(shipped.find(name).read_text())
    assert {"name", "description"} <= own.keys(), "a run or a line in the list would be taken for another recipe's"


def test_no_two_shipped_recipes_share_a_run_directory() -> None:
    names = [recipe.load(name).name for name in SHIPPED]
    assert len(set(names)) == len(names)


def test_the_quickstart_is_the_one_of_the_design() -> None:
    r = recipe.load("quickstart")
    assert r.model == recipe.Model(
        dim=128,
        layers=4,
        heads=4,
        ffn_dim=512,
        dropout=0.0,
        positions="rope",
        causal=True,
        attention={
            "backend": "dilated",
            "segment_lengths": [256, 512, 1024],
            "dilation_rates": [1, 2, 4],
            "head_offsets": "interleaved",
            "overlap": "multiset",
            "mixing": "denominators",
        },
    )
    assert (r.data.source, r.data.tokenizer, r.data.seq_len, r.data.batch_size) == ("python_stdlib", "bytes", 1024, 8)
    assert (r.optimizer.lr, r.optimizer.betas, r.optimizer.weight_decay) == (3e-3, (0.9, 0.98), 0.01)
    assert (r.trainer["max_steps"], r.trainer["devices"], r.trainer["precision"]) == (250, 1, "32-true")
    assert r.checkpoint == recipe.Checkpoint(every_n_steps=500, keep=3)
    assert r.strategy == recipe.Strategy(name="auto", sequence_parallel_size=1)


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.startswith("backends/")])
def test_the_backends_run_the_quickstart_and_differ_in_the_attention_alone(name: str) -> None:
    r, quickstart = recipe.load(name), recipe.load("quickstart")
    assert r.model.attention["backend"] == name.removeprefix("backends/")
    same = dataclasses.replace(r.model, attention=quickstart.model.attention)
    assert dataclasses.replace(r, name=quickstart.name, description=quickstart.description, model=same) == quickstart


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_models_have_its_size_and_batch(name: str) -> None:
    r = recipe.load(name)
    batch = r.data.batch_size * r.trainer["devices"] * r.trainer["accumulate_grad_batches"]
    assert batch * r.data.seq_len == 2**19, "0.5M tokens in an optimizer step"
    assert name.endswith(f"_{r.data.seq_len // 1024}k")
    with torch.device("meta"):
        network = model.build(r.model, 100_277, r.data.seq_len, dtype=torch.bfloat16)
    assert next(network.parameters()).is_meta
    body = sum(p.numel() for p in network.parameters()) - 100_277 * 768
    # Four matrices of the attention and two of the feed-forward per layer; the rest are biases and layer norms.
    assert 12 * (4 * 768**2 + 2 * 768 * 3072) < body < 1.01 * 12 * (4 * 768**2 + 2 * 768 * 3072)


def test_the_papers_recipes_cover_what_it_compares() -> None:
    trained = {"transformer": [2], "sparse": [8, 16, 32], "longnet": [8, 16, 32]}
    assert set(PAPER) == {f"paper/{kind}_{k}k" for kind, lengths in trained.items() for k in lengths}
    backends = {"transformer": "sdpa", "sparse": "xformers", "longnet": "dilated"}
    for name in PAPER:
        kind = name.removeprefix("paper/").partition("_")[0]
        assert recipe.load(name).model.attention["backend"] == backends[kind]


# --- which layer wins


def test_defaults_then_extends_then_file_then_command_line(tmp_path: Path) -> None:
    write(tmp_path, "name: low\nseed: 1\nmodel: {dim: 64, heads: 2}\ntrainer: {max_steps: 9}\n", "low.yaml")
    write(tmp_path, "extends: ../low.yaml\nseed: 2\nmodel: {layers: 3}\n", "sub/middle.yaml")
    top = write(tmp_path, "extends: sub/middle.yaml\nname: top\nmodel: {ffn_dim: 100}\n", "top.yaml")
    r = recipe.load(top, ["model.layers=5"])
    assert (r.name, r.seed, r.trainer["max_steps"]) == ("top", 2, 9)
    default = recipe_schema.Model()
    assert r.model == dataclasses.replace(
        default, dim=64, heads=2, layers=5, ffn_dim=100, attention=r.model.attention
    ), "each key from the highest layer that has it"
    assert r.extends is None


def test_mappings_merge_and_lists_replace(tmp_path: Path) -> None:
    write(tmp_path, SMALLEST + "data: {seq_len: 64, eval_contexts: [8, 16, 32]}\n", "low.yaml")
    r = load_text(tmp_path, "extends: low.yaml\ndata: {eval_contexts: [4]}\n")
    assert (r.data.seq_len, r.data.eval_contexts) == (64, [4])


DILATED = "model: {layers: 2, attention: {backend: dilated, segment_lengths: [8, 16], dilation_rates: [1, 2]}}\n"


def test_a_changed_selector_starts_its_mapping_afresh_and_no_other(tmp_path: Path) -> None:
    write(tmp_path, SMALLEST + DILATED + "data: {seq_len: 32, tokenizer: gpt2, batch_size: 3}\n", "low.yaml")
    by_file = load_text(tmp_path, "extends: low.yaml\nmodel: {attention: {backend: naive}}\n")
    assert by_file.model.attention == {"backend": "naive", "pattern": None}
    assert (by_file.model.layers, by_file.data.tokenizer) == (2, "gpt2")
    by_dotlist = recipe.load(tmp_path / "low.yaml", ["model.attention.backend=naive"])
    assert by_dotlist.model.attention == by_file.model.attention
    files = recipe.load(tmp_path / "low.yaml", ["data.batch_size=5", "data.source=files", "data.paths=[a.txt]"])
    default = recipe_schema.Data()
    assert (files.data.tokenizer, files.data.seq_len, files.data.batch_size) == (default.tokenizer, default.seq_len, 5)
    assert files.model.attention["segment_lengths"] == [8, 16]


def test_a_selector_named_again_keeps_what_is_below(tmp_path: Path) -> None:
    write(tmp_path, SMALLEST + DILATED, "low.yaml")
    r = load_text(tmp_path, "extends: low.yaml\nmodel: {attention: {backend: dilated, dilation_rates: [1, 4]}}\n")
    assert r.model.attention["segment_lengths"] == [8, 16]
    assert r.model.attention["dilation_rates"] == [1, 4]


def test_a_selector_changed_and_changed_back_forgets(tmp_path: Path) -> None:
    write(tmp_path, SMALLEST + DILATED, "low.yaml")
    write(tmp_path, "extends: low.yaml\nmodel: {attention: {backend: sdpa}}\n", "middle.yaml")
    r = load_text(tmp_path, "extends: middle.yaml\nmodel: {attention: {backend: dilated}}\n")
    assert r.model.attention["segment_lengths"] == [2048, 4096, 8192, 16384, 32768], "the backend's own default"


def test_the_last_of_two_overrides_wins() -> None:
    assert recipe.load("quickstart", ["seed=1", "seed=2"]).seed == 2
    assert recipe.load("quickstart", ["model={layers: 3}", "model.layers=2"]).model.layers == 2


def test_a_resolved_recipe_holds_the_defaults_of_its_choices(tmp_path: Path) -> None:
    r = load_text(tmp_path, SMALLEST + "model: {attention: {backend: xformers}}\n")
    assert r.model.attention.keys() == {"backend", "pattern", "block_size", "local_blocks", "summary_blocks"}


def test_interpolation_takes_another_key(tmp_path: Path) -> None:
    r = load_text(tmp_path, SMALLEST + "model: {heads: 3, dim: 96, ffn_dim: '${.dim}'}\nseed: ${model.heads}\n")
    assert (r.model.ffn_dim, r.seed) == (96, 3)
    assert recipe.load(tmp_path / "r.yaml", ["model.heads=2"]).seed == 2, "after the layers are merged"
    afresh = ["data.source=files", "data.paths=[a.txt]", "seed=${data.seq_len}"]
    assert recipe.load(tmp_path / "r.yaml", afresh).seed == 1024, "a default of a mapping that starts afresh"


# --- YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-3", 0.003), ("1E4", 10000.0), ("3.0e-3", 0.003), (".5", 0.5), ("1_000", 1000), ("-7", -7), ("0", 0),
        ("010", "010"), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("1e", "1e"), ("e5", "e5"), (".", "."),
        ("'3e-3'", "3e-3"), ("yes", True), ("null", None), ("none", "none"), ("", None),
    ],
)  # fmt: skip
def test_scalars(text: str, value: Any) -> None:
    layer, problems = recipe_files.parse_dotlist([f"key={text}"])
    assert not problems
    assert layer.values["key"] == value
    assert type(layer.values["key"]) is type(value)


def test_a_learning_rate_like_3e_3_is_a_number(tmp_path: Path) -> None:
    assert load_text(tmp_path, SMALLEST + "optimizer: {lr: 3e-3}\n").optimizer.lr == 0.003
    assert recipe.load("quickstart", ["optimizer.lr=1e-4"]).optimizer.lr == 1e-4


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    text = "name: &n x\ndescription: *n\nmodel: &m {dim: 8, heads: 2}\ntrainer: {max_steps: 5}\n"
    assert load_text(tmp_path, text).description == "x"
    layer, problems = recipe_files.read_file(write(tmp_path, "a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3\n"))
    assert layer is not None
    assert (layer.values["b"], problems) == ({"x": 1, "y": 3}, [])
    assert (layer.places["b.y"], layer.places["b.x"]) == (f"{tmp_path / 'r.yaml'}:4", f"{tmp_path / 'r.yaml'}:1")


def test_an_anchored_mapping_may_override_what_it_merges_and_be_used_twice(tmp_path: Path) -> None:
    path = write(tmp_path, "a: &a {x: 1}\nb: &b {<<: *a, x: 2}\nc: *b\nd: *b\n")
    layer, problems = recipe_files.read_file(path)
    assert layer is not None
    assert problems == []
    assert layer.values == {"a": {"x": 1}, "b": {"x": 2}, "c": {"x": 2}, "d": {"x": 2}}


def test_an_alias_inside_its_anchor_is_told(tmp_path: Path) -> None:
    path = write(tmp_path, SMALLEST + "imports: &i [*i]\n")
    assert refusal(path) == f"imports[0] ({path}:3): an alias that holds itself"


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + SMALLEST.replace("\n", "\r\n").encode())
    assert recipe.load(path).name == "x"


# --- problems


def test_all_problems_are_told_at_once_with_their_lines(tmp_path: Path) -> None:
    low = write(tmp_path, "name: low\nmodel:\n  dim: 0\n  layrs: 3\ntrainer: {max_steps: 5}\n", "low.yaml")
    top = write(tmp_path, "extends: low.yaml\noptimizer:\n  betas: [0.9]\nlr: 1\n", "top.yaml")
    told = refusal(top, "data.seq_len=many", "model.heads")
    assert told.splitlines()[0] == f"{top}: 6 problems"
    for expected in (
        f"model.dim ({low}:3): got 0, expected at least 1",
        f"model.layrs ({low}:4): unknown key; did you mean model.layers?",
        f"optimizer.betas ({top}:3): got [0.9] (a list), expected a list of 2 values",
        f"lr ({top}:4): unknown key; did you mean optimizer.lr?",
        "data.seq_len (on the command line): got 'many' (text), expected a whole number",
        "on the command line: got 'model.heads', expected key.path=value, like model.layers=2",
    ):
        assert f"\n  {expected}" in told


def test_a_line_is_that_of_the_layer_that_won(tmp_path: Path) -> None:
    low = write(tmp_path, SMALLEST + "seed: -1\n", "low.yaml")
    top = write(tmp_path, "extends: low.yaml\n\nseed: -2\n", "top.yaml")
    assert f"seed ({top}:3): got -2" in refusal(top)
    assert f"seed ({low}:3): got -1" in refusal(low)
    assert "seed (on the command line): got -3" in refusal(low, "seed=-3")
    assert recipe.load(top, ["seed=3"]).seed == 3


def test_what_is_missing_is_told_where_it_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path, "name: x\nmodel: {dim: 8}\ntrainer:\n  devices: 1\ndata:\n  seq_len: 4\n  source: files\n")
    told = refusal(path)
    assert f"data.paths ({path}:7): missing" in told
    assert f"trainer.max_steps ({path}:3): missing" in told
    assert "data.paths (on the command line): missing" in refusal("quickstart", "data.source=files")


def test_items_of_lists_have_lines_too(tmp_path: Path) -> None:
    path = write(tmp_path, SMALLEST + "data:\n  eval_contexts:\n    - 4\n    - x\n")
    assert f"data.eval_contexts[1] ({path}:6): got 'x'" in refusal(path)


def test_keys_that_do_not_fit_together_are_only_told_when_each_is_right(tmp_path: Path) -> None:
    path = write(tmp_path, SMALLEST + "model: {dim: 100, heads: 3}\n")
    assert "like 99 or 102" in refusal(path)
    told = refusal(path, "model.heads=x")
    assert "multiple" not in told
    assert "model.heads" in told


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.heads=128"], "model.positions"),  # heads of one dimension
        (["model.dim=12", "model.positions=xpos"], "which turns pairs of dimensions, but heads have 3"),
        (["model.causal=false", "model.positions=xpos"], "model.causal"),
        (["model.causal=false"], "language_modeling predicts the next token"),
        (["task=in_context", "data={source: passkey}", "model.causal=false"], "in_context predicts the next token"),
        (["strategy.sequence_parallel_size=2"], "does not divide sequences"),
        (["data.eval_contexts=[8,8]"], "[8] stand twice"),
        (["resume=nowhere"], "nothing is there"),
        (["init_from=nowhere"], "nothing is there"),
        (["resume=pyproject.toml", "init_from=pyproject.toml"], "leave out one"),
        (["data.paths=[*.py]"], "quote text, as in 'key=[\"*.py\"]'"),
        (["data.tokenizer=gtp2"], "did you mean 'gpt2'?"),
        (["model.attention.dilation_rates=[1]"], "segment_lengths has 3 entries and dilation_rates has 1"),
        (["model.attention={backend: naive, pattern: {kind: dilatd}}"], "did you mean 'dilated'?"),
    ],
)
def test_keys_at_odds(overrides: list[str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    told = refusal("quickstart", *overrides)
    assert expected in told
    assert "problems" not in told, "one cause, one problem"


def test_heads_of_odd_size_are_fine_without_positions() -> None:
    assert recipe.load("quickstart", ["model.dim=12", "model.positions=none"]).model.dim == 12


@pytest.mark.parametrize("name", recipe_schema.TRAINER_REFUSED)
def test_the_trainer_arguments_of_the_kit_are_refused_with_the_reason(name: str) -> None:
    told = refusal("quickstart", f"trainer.{name}=1")
    why = recipe_schema.TRAINER_REFUSED[name]
    assert told == f"trainer.{name} (on the command line): a recipe cannot set it: {why}"


def test_other_trainer_arguments_pass_and_keep_the_kits_defaults(tmp_path: Path) -> None:
    r = load_text(tmp_path, SMALLEST, "trainer.limit_val_batches=0.5", "trainer.deterministic=warn")
    assert r.trainer == recipe_schema.TRAINER_DEFAULTS | {
        "max_steps": 5,
        "limit_val_batches": 0.5,
        "deterministic": "warn",
    }


def test_lower_step_counts_and_lengths_clip_what_they_outrun() -> None:
    r = recipe.load("quickstart", ["trainer.max_steps=10", "data.seq_len=300"])
    assert (r.optimizer.warmup_steps, r.data.eval_contexts) == (10, [256, 300])
    assert r.notes == [
        "optimizer.warmup_steps 30 clipped to trainer.max_steps 10",
        "data.eval_contexts [256, 512, 1024] clipped to [256, 300] by data.seq_len 300",
    ]
    assert not recipe.load("quickstart", ["trainer.max_steps=30", "data.seq_len=1024"]).notes


# --- there and back

text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=30)
folder_names = st.from_regex(r"\w[\w.+-]{0,20}", fullmatch=True).filter(lambda name: ".." not in name)
lines = text.filter(lambda line: "\n" not in line)
rates = st.floats(1e-12, 1000.0)
shares = st.floats(0, 1, exclude_max=True)
counts = st.integers(1, 10**6)

recipes = st.builds(
    Recipe,
    name=folder_names,
    description=lines,
    seed=st.integers(0, 2**32 - 1),
    resume=st.sampled_from([None, "auto"]),
    model=st.builds(
        lambda heads, pairs, **rest: recipe.Model(dim=2 * heads * pairs, heads=heads, **rest),
        heads=st.integers(1, 12),
        pairs=st.integers(1, 64),
        layers=counts,
        ffn_dim=counts,
        dropout=shares,
        positions=st.sampled_from(["rope", "xpos", "none"]),
        attention=st.sampled_from(
            [
                {"backend": "sdpa"},
                {"backend": "naive", "pattern": None},
                {"backend": "naive", "pattern": {"kind": "dilated", "segment_lengths": [4], "dilation_rates": [1]}},
                {"backend": "dilated", "segment_lengths": [4], "dilation_rates": [1], "head_offsets": "grouped"},
            ]
        ),
    ),
    data=st.builds(
        recipe.Data,
        tokenizer=st.sampled_from(["bytes", "gpt2", "tiktoken:cl100k_base"]),
        seq_len=st.integers(100, 10**7),
        batch_size=counts,
        num_workers=st.integers(0, 9),
        eval_contexts=st.lists(st.integers(1, 100), unique=True, max_size=3),
        source=st.just("files"),
        options=st.fixed_dictionaries({"paths": st.lists(text, min_size=1, max_size=3)}, optional={"field": text}),
    ),
    optimizer=st.builds(
        recipe.Optimizer,
        name=st.sampled_from(["adamw", "adam", "sgd"]),
        lr=rates,
        betas=st.tuples(shares, shares),
        weight_decay=st.floats(0, 1000),
        schedule=st.sampled_from(["linear", "cosine", "constant"]),
    ),
    trainer=st.fixed_dictionaries(
        {"max_steps": counts, **{key: st.just(value) for key, value in recipe_schema.TRAINER_DEFAULTS.items()}},
        optional={"accelerator": st.just("cpu"), "limit_val_batches": st.one_of(counts, shares)},
    ),
    checkpoint=st.builds(recipe.Checkpoint, every_n_steps=counts, keep=counts),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(recipes)
@example(Recipe(name="3e-3", description="${model.dim} \\${x \\\\${", trainer={"max_steps": 1}))
@example(Recipe(name="x", description="\x85 and \u2028", trainer={"max_steps": 1}))
@example(Recipe(name="1e5", description="010 # not a comment", task="language_modeling", trainer={"max_steps": 1}))
def test_a_saved_recipe_is_the_recipe(tmp_path: Path, r: Recipe) -> None:
    path = tmp_path / "saved.yaml"
    recipe.save(r, path)
    read = recipe.load(path)
    once = dataclasses.replace(r, trainer=recipe_schema.TRAINER_DEFAULTS | r.trainer)
    once.model.attention = read.model.attention | r.model.attention  # the defaults of the choices are written out
    once.data.options = read.data.options | r.data.options
    assert read == once
    assert recipe.dumps(read) == recipe.dumps(once)
    recipe.save(read, path)
    assert recipe.load(path) == read
    assert recipe.to_dict(recipe.load(path)) == recipe.to_dict(read)


def test_a_dict_of_a_recipe_is_plain_and_its_own(tmp_path: Path) -> None:
    r = recipe.load("quickstart")
    values = recipe.to_dict(r)
    assert yaml.safe_load(yaml.safe_dump(values)) == values
    values["model"]["attention"]["segment_lengths"].append(1)
    values["trainer"]["max_steps"] = 0
    assert recipe.load("quickstart") == r


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.one_of(st.binary(max_size=60), st.text("{}[]:,-&*!|>'\"%@`#?<= \n\tab1.$\\", max_size=40).map(str.encode)))
@example(b"a: &a [*a]")
@example(b"<<: 1")
@example(b"? [a]\n: 1")
@example(b"a: !!python/object:os.system {}")
@example(b"a: !!int x")
@example(b"a: " + b"[" * 2000)
@example(b"--- 1\n--- 2")
@example("\u2028".encode())
def test_no_file_whatever_breaks_the_reader(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any.yaml"
    path.write_bytes(content)
    told = refusal(path)
    assert "any.yaml" in told
    assert "Traceback" not in told


@settings(max_examples=100)
@given(st.text("abm.=[]{}\"'$*&! 01-", max_size=20))
def test_no_override_whatever_breaks_the_reader(item: str) -> None:
    refusal("quickstart", item, "seed=-1")


# --- plug-ins


PLUGIN = """
from longnet_kit import attention

@attention.register({name!r})
class Mine(attention.AttentionBackend):
    def __init__(self, size: int = 3) -> None:
        super().__init__()
"""


@pytest.fixture
def keep_sys_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.usefixtures("keep_sys_path")
def test_imports_are_found_beside_the_recipe_and_again_from_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, PLUGIN.format(name="beside"), "lab/plugin_beside.py")
    monkeypatch.chdir(tmp_path)
    text = SMALLEST + "imports: [plugin_beside]\nmodel: {attention: {backend: beside}}\n"
    r = recipe.load(write(tmp_path, text, "lab/r.yaml"))
    assert r.model.attention == {"backend": "beside", "size": 3}
    saved = tmp_path / "runs" / "x" / "recipe.yaml"
    saved.parent.mkdir(parents=True)
    recipe.save(r, saved)
    program = "from longnet_kit import recipe; print(recipe.load('runs/x/recipe.yaml').model.attention)"
    environment = {"PYTHONPATH": str(Path(__file__).parent.parent), "PATH": ""}
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.stdout.strip() == "{'backend': 'beside', 'size': 3}", ended.stderr


@pytest.mark.usefixtures("keep_sys_path")
def test_imports_are_found_in_the_working_directory_then_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("recipes", "here", "path"):
        write(tmp_path, PLUGIN.format(name=f"{place}_of_three"), f"{place}/plugin_everywhere.py")
        write(tmp_path, PLUGIN.format(name=f"{place}_of_two"), f"{place}/plugin_{place}.py")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(tmp_path / "path")
    text = SMALLEST + "imports: [plugin_everywhere, plugin_here, plugin_path]\nmodel: {attention: {backend: %s}}\n"
    r = recipe.load(write(tmp_path, text % "recipes_of_three", "recipes/r.yaml"))
    assert r.imports == [f"{tmp_path / 'recipes'}/plugin_everywhere", "plugin_here", "plugin_path"]
    assert "path_of_two" in refusal(tmp_path / "recipes" / "r.yaml", "model.attention.backend=nothing_like_it_at_all")


@pytest.mark.usefixtures("keep_sys_path")
def test_imports_of_an_extended_recipe_are_found_beside_it(tmp_path: Path) -> None:
    write(tmp_path, PLUGIN.format(name="low_down"), "low/plugin_low_down.py")
    write(tmp_path, SMALLEST + "imports: [plugin_low_down]\n", "low/low.yaml")
    path = write(tmp_path, "extends: low/low.yaml\nmodel: {attention: {backend: low_down}}\n")
    assert recipe.load(path).model.attention["backend"] == "low_down"


@pytest.mark.usefixtures("keep_sys_path")
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("x = 1\nraise RuntimeError('out of\\ntune')", ":2: tune"),
        ("x = 1\n1 / 0", ":2: ZeroDivisionError: division by zero"),
        ("def broken(:", "SyntaxError"),
        ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("raise SystemExit(3)", ":1: SystemExit: 3"),
        (PLUGIN.format(name="sdpa"), "attention backend 'sdpa' is already registered"),
    ],
)
def test_a_plugin_that_fails_is_told_with_its_line(tmp_path: Path, code: str, expected: str) -> None:
    module = f"plugin_fails_{abs(hash(code))}"
    plugin = write(tmp_path, code, f"{module}.py")
    told = refusal(write(tmp_path, SMALLEST + f"imports:\n  - {module}\n"))
    assert f"imports[0] ({tmp_path / 'r.yaml'}:4): importing {module!r} failed: {plugin}:" in told
    assert expected in told


def test_a_missing_plugin_is_told_with_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, SMALLEST + "imports: [nowhere_to_be_found]\n", "lab/r.yaml")
    monkeypatch.chdir(tmp_path)
    told = refusal(path)
    assert "'nowhere_to_be_found'" in told
    assert f"{tmp_path / 'lab'}, {tmp_path}, nor on sys.path" in told
    assert "write window" in refusal(path, "imports=[window.py]")


@pytest.mark.usefixtures("keep_sys_path")
def test_two_plugins_of_one_name_are_not_mixed_up(tmp_path: Path) -> None:
    for place in ("one", "two"):
        write(tmp_path, PLUGIN.format(name=f"twin_{place}"), f"{place}/plugin_twin.py")
        write(tmp_path, SMALLEST + "imports: [plugin_twin]\n", f"{place}/r.yaml")
    recipe.load(tmp_path / "one" / "r.yaml")
    recipe.load(tmp_path / "one" / "r.yaml")
    told = refusal(tmp_path / "two" / "r.yaml")
    assert str(tmp_path / "one" / "plugin_twin.py") in told
    assert str(tmp_path / "two" / "plugin_twin.py") in told


def test_importing_the_module_is_light() -> None:
    heavy = "{'torch', 'lightning', 'omegaconf'}"
    program = f"import sys; from longnet_kit import recipe; print(*sorted({heavy} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == ""
