"""Recipes: which layer wins, what is read from YAML, and what comes back from a file."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from longnet_kit import recipe, recipe_files, recipe_schema
from longnet_kit.recipe import Recipe
from tests.recipes import SMALLEST, load_text, refusal, write

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


def test_importing_the_module_is_light() -> None:
    heavy = "{'torch', 'lightning', 'omegaconf'}"
    program = f"import sys; from longnet_kit import recipe; print(*sorted({heavy} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == ""


def test_an_eps_that_is_0_in_half_precision_is_refused_with_what_to_use(tmp_path: Path) -> None:
    half = SMALLEST.replace("trainer: {", "trainer: {precision: 16-true, ")
    message = refusal(write(tmp_path, half))
    assert "got '16-true' with optimizer.eps 1e-08, which is 0 in the weights' float16" in message
    assert "use optimizer.eps=1e-4, or 16-mixed or bf16-true here" in message
    for fine in ("{name: sgd}", "{eps: 1.0e-4}"):
        assert load_text(tmp_path, f"{half}optimizer: {fine}\n").trainer["precision"] == "16-true"
    assert recipe.load(write(tmp_path, half), ["trainer.precision=16-mixed"]).optimizer.eps == 1e-8
    for wrong in ("0", ".inf", ".nan", "-1", "1" + "0" * 400, "abc", "null"):
        assert "optimizer.eps (" in refusal(write(tmp_path, f"{half}optimizer: {{eps: {wrong}}}\n")), wrong


def test_a_decay_that_half_precision_loses_is_noted(tmp_path: Path) -> None:
    r = load_text(tmp_path, SMALLEST.replace("trainer: {", "trainer: {precision: bf16-true, "))
    assert r.notes == [
        "optimizer.weight_decay 0.01 at lr 0.003 is lost in the rounding of the weights under trainer.precision "
        "bf16-true; it works under bf16-mixed or 16-mixed"
    ]
    assert load_text(tmp_path, SMALLEST.replace("trainer: {", "trainer: {precision: bf16-mixed, ")).notes == []
