"""The table of `longnet list`: every recipe at hand, with its line. Reads the files, but does not check them."""

from __future__ import annotations

from pathlib import Path

from longnet_kit import recipe_files, shipped

HERE = Path("recipes")


def table() -> str:
    """The shipped recipes and those in ./recipes, grouped by folder; a file that cannot be read is listed as such."""
    roots = [shipped.recipes_dir()]
    if HERE.is_dir() and not HERE.samefile(roots[0]):
        roots.append(HERE)
    blocks = []
    for root in roots:
        files = sorted((p for p in root.rglob("*.yaml")), key=lambda p: (p.parent, p.name))
        entries = [(_name(file, root, root == HERE), _line(file)) for file in files]
        width = max((len(name) for name, _ in entries), default=0)
        for folder in dict.fromkeys(file.parent for file in files):
            rows = [entry for entry, file in zip(entries, files, strict=True) if file.parent == folder]
            blocks.append("\n".join(f"{name:<{width}}  {line}".rstrip() for name, line in rows))
    return "\n\n".join(blocks) if blocks else "no recipes"


def _name(file: Path, root: Path, own: bool) -> str:
    """What to type after a verb."""
    return file.as_posix() if own else file.relative_to(root).with_suffix("").as_posix()


def _line(file: Path) -> str:
    """The description; where there is none, that of the recipe it extends, named."""
    layers, problems, complete = recipe_files.read_chain(file)
    if problems or not complete:
        return f"(broken: {problems[0]})"
    for layer in reversed(layers):
        description = layer.values.get("description")
        if isinstance(description, str):
            return " ".join(description.split())
    return ""
