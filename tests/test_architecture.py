"""Imports point one way: from the command lines down to tritcore, without a cycle."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"tritcore": "core", "tritconv": "convert", "tritrun": "runtime"}


def module_name(path: Path, root: Path) -> str:
    """The dotted name of a source below `root`."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> dict[str, str]:
    """The text of each module, by name."""
    return {
        module_name(path, ROOT / folder): path.read_text(encoding="utf-8")
        for package, folder in PACKAGES.items()
        for path in sorted((ROOT / folder / package).rglob("*.py"))
    }


def imported(name: str, text: str, modules: set[str]) -> Iterator[str]:
    """The modules of these packages that a module imports, anywhere in it; for type checkers only, too."""
    for node in ast.walk(ast.parse(text)):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            assert node.module is not None
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name if name in modules else node.module for name in submodules]
        yield from (other for other in found if other in modules and other != name)


def graph(texts: dict[str, str]) -> dict[str, set[str]]:
    """The modules that each module imports, by name."""
    return {name: set(imported(name, text, set(texts))) for name, text in texts.items()}


IMPORTS = graph(sources())

# importer -> what it may not import, each with all below it
FORBIDDEN = {
    "tritcore": ("tritconv", "tritrun"),
    "tritrun": ("tritconv",),
    "tritconv": ("tritrun",),
    "tritconv.calibration": ("tritconv.methods",),
    "tritconv.sources": ("tritconv.calibration", "tritconv.methods"),
}
# modules that only these import
ENTRIES = {
    "tritconv.cli": {"tritconv.__main__"},
    "tritconv.convert": {"tritconv.cli"},
    "tritrun.cli": {"tritrun.__main__"},
}


def below(package: str) -> set[str]:
    """A module or package, and all modules in it."""
    return {name for name in IMPORTS if name == package or name.startswith(f"{package}.")}


def test_there_is_no_cycle() -> None:
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize("importer", FORBIDDEN)
def test_nothing_is_imported_from_above(importer: str) -> None:
    allowed = {name for name in IMPORTS if not any(name in below(other) for other in FORBIDDEN[importer])}
    wrong = {name: sorted(IMPORTS[name] - allowed) for name in sorted(below(importer)) if IMPORTS[name] - allowed}
    assert not wrong


@pytest.mark.parametrize("entry", ENTRIES)
def test_entry_points_are_imported_by_nothing_else(entry: str) -> None:
    assert entry in IMPORTS
    assert {name for name, others in IMPORTS.items() if entry in others} <= ENTRIES[entry]


def test_every_form_of_import_is_seen() -> None:
    texts = {
        "p": "",
        "p.a": "import p.b",
        "p.b": "from p import c",
        "p.c": "def f():\n    from p.d import x",
        "p.d": "import typing\nif typing.TYPE_CHECKING:\n    from p.a import y",
    }
    found = graph(texts)
    assert found == {"p": set(), "p.a": {"p.b"}, "p.b": {"p.c"}, "p.c": {"p.d"}, "p.d": {"p.a"}}
    with pytest.raises(CycleError):
        TopologicalSorter(found).prepare()


def test_all_packages_are_there() -> None:
    for package in (*FORBIDDEN, *PACKAGES):
        assert below(package)
