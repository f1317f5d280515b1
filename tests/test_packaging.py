"""What a wheel, a source archive and an installation hold, and that the command line starts light."""

from __future__ import annotations

import configparser
import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from longnet_kit import shipped

ROOT = Path(__file__).parent.parent
BUILT_FROM = ("setup.cfg", "pyproject.toml", "LICENSE", "README.md", "longnet_kit", "recipes")
HEAVY = ("torch", "lightning", "xformers", "tensorboard", "matplotlib", "numpy", "pandas", "datasets", "tokenizers")


def run(*command: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python away from the clone; with `path`, on the package that lies there."""
    environment = dict(os.environ)
    environment.pop("PYTHONPATH", None)
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)


def cli(code: str, *arguments: str, cwd: Path, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run the command line, then `code` in the same interpreter, with its exit code in `status`."""
    program = f"""
import sys
from longnet_kit import cli
sys.argv = ["longnet", *{arguments!r}]
try:
    status = cli.main()
except SystemExit as end:
    status = end.code
{code}"""
    return run("-c", program, cwd=cwd, path=path)


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source archive of this tree and the wheel built from that archive; nothing is downloaded."""
    tree = tmp_path_factory.mktemp("tree")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tree / name)
    built = run("-m", "build", "--no-isolation", str(tree), cwd=tree)
    assert built.returncode == 0, built.stdout + built.stderr
    return tree / "dist"


@pytest.fixture(scope="module")
def wheel(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked."""
    (archive,) = archives.glob("*.whl")
    folder = tmp_path_factory.mktemp("wheel")
    zipfile.ZipFile(archive).extractall(folder)
    return folder


def files_under(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}


def test_a_wheel_holds_every_module_and_recipe(wheel: Path) -> None:
    inside = files_under(wheel / "longnet_kit")
    package = files_under(ROOT / "longnet_kit")
    recipes = {f"recipes/{name}" for name in files_under(ROOT / "recipes")}
    assert "py.typed" in package
    assert "recipes/quickstart.yaml" in recipes
    assert inside == package | recipes, "a new package belongs in setup.cfg, under `packages`"


def test_a_wheel_holds_nothing_beside_the_package(wheel: Path) -> None:
    version = metadata.version("longnet_kit") if _installed() else "0.1.0"
    assert {entry.name for entry in wheel.iterdir()} == {"longnet_kit", f"longnet_kit-{version}.dist-info"}


def test_a_source_archive_holds_what_builds_the_wheel(archives: Path) -> None:
    (archive,) = archives.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames()}
    recipes = {f"recipes/{name}" for name in files_under(ROOT / "recipes")}
    assert recipes | {"setup.cfg", "pyproject.toml", "LICENSE", "README.md"} <= inside


def test_the_metadata_says_what_the_package_needs(wheel: Path) -> None:
    (folder,) = wheel.glob("*.dist-info")
    told = email.message_from_string((folder / "METADATA").read_text())
    requirements = [Requirement(line) for line in told.get_all("Requires-Dist", [])]
    assert told["Requires-Python"] == ">=3.11"
    assert {"dev", "huggingface", "tokenizers"} == set(told.get_all("Provides-Extra", []))
    assert {r.name for r in requirements if not r.marker} >= {"torch", "lightning", "torchmetrics", "omegaconf"}
    for r in requirements:
        assert all(part.operator == ">=" for part in r.specifier), f"{r}: lower bounds only"
    (xformers,) = (r for r in requirements if r.name == "xformers")
    assert xformers.marker is not None
    there = {"sys_platform": "linux", "platform_machine": "x86_64"}
    for elsewhere in ({"sys_platform": "darwin"}, {"platform_machine": "aarch64"}):
        assert not xformers.marker.evaluate(there | elsewhere)
    for platform in (there, {"sys_platform": "win32", "platform_machine": "AMD64"}):
        assert xformers.marker.evaluate(platform)
    scripts = configparser.ConfigParser()
    scripts.read(folder / "entry_points.txt")
    assert dict(scripts["console_scripts"]) == {"longnet": "longnet_kit.cli:command"}


def test_a_wheel_lists_and_finds_its_recipes_away_from_the_clone(wheel: Path, tmp_path: Path) -> None:
    listed = cli("print(cli.__file__, status)", "list", cwd=tmp_path, path=wheel)
    assert listed.stdout.splitlines()[-1] == f"{wheel / 'longnet_kit' / 'cli.py'} 0", listed.stderr
    for name in shipped.names():
        assert name in listed.stdout
    program = "from longnet_kit import shipped; print(shipped.find('quickstart'))"
    found = run("-c", program, cwd=tmp_path, path=wheel)
    assert found.stdout.strip() == str(wheel / "longnet_kit" / "recipes" / "quickstart.yaml"), found.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["fit", "--help"]])
def test_help_and_list_import_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    code = f"print('imported:', [name for name in {HEAVY!r} if name in sys.modules]); sys.exit(status)"
    ended = cli(code, *arguments, cwd=tmp_path)
    assert (ended.returncode, ended.stdout.splitlines()[-1]) == (0, "imported: []"), ended.stderr


def test_a_package_adds_a_backend_by_its_entry_point(tmp_path: Path) -> None:
    (tmp_path / "elsewhere.py").write_text(
        "from longnet_kit import attention\n"
        "class Mine(attention.AttentionBackend):\n"
        "    def forward(self, q, k, v, causal=True, key_padding_mask=None):\n"
        "        return v\n"
    )
    told = tmp_path / "elsewhere-1.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (told / "entry_points.txt").write_text("[longnet_kit.attention]\nmine = elsewhere:Mine\n")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from longnet_kit import attention\n"
        "print('mine' in attention.names(), type(attention.build({'backend': 'mine'})).__module__)"
    )
    ended = run("-c", program, cwd=tmp_path, path=ROOT)
    assert ended.stdout.split() == ["True", "elsewhere"], ended.stderr


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "tools" / "constraints.txt").read_text().splitlines()
    return {normal(n): v for n, _, v in (line.partition("==") for line in lines if line and not line.startswith("#"))}


def test_every_declared_requirement_is_pinned_within_its_bounds() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    declared = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    requirements = [Requirement(line) for text in declared for line in text.strip().splitlines()]
    assert len(requirements) > 15
    for r in requirements:
        assert normal(r.name) in pins(), f"{r.name} is missing in tools/constraints.txt"
        assert Version(pins()[normal(r.name)]) in r.specifier
    assert pins()["torch"] == "2.13.0"


@pytest.mark.skipif(
    not (Path(sys.prefix) / ".longnet_kit" / "installed").is_file(), reason="not the environment that tools/ make"
)
def test_everything_installed_is_pinned() -> None:
    installed = {normal(d.metadata["Name"]): d.version.partition("+")[0] for d in metadata.distributions()}
    for ours in ("pip", "longnet-kit"):
        installed.pop(ours, None)
    assert installed.items() <= pins().items()


def test_a_path_wins_over_a_shipped_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    theirs = shipped.recipes_dir() / "quickstart.yaml"
    assert shipped.find("quickstart") == shipped.find("quickstart.yaml") == shipped.find(str(theirs)) == theirs
    (tmp_path / "quickstart.yaml").touch()
    assert shipped.find("quickstart.yaml") == Path("quickstart.yaml")
    (tmp_path / "quickstart").mkdir()
    assert shipped.find("quickstart") == theirs


@pytest.mark.parametrize(
    ("given", "answer"),
    [("quickstrat", "did you mean 'quickstart'?"), ("no/such/file.yaml", "known: "), (".", "a folder")],
)
def test_an_unknown_recipe_is_told_with_the_nearest_one(given: str, answer: str) -> None:
    with pytest.raises(ValueError, match=re.escape(answer)):
        shipped.find(given)


def _installed() -> bool:
    return any(normal(d.metadata["Name"]) == "longnet-kit" for d in metadata.distributions())
