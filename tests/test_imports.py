"""The layering: values at the bottom, rules without I/O above them, acts above the rules, the loop on top."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import unpacker

PACKAGE = Path(unpacker.__file__).parent

LAYERS: tuple[tuple[str, ...], ...] = (
    # values and contracts
    ("errors", "limits"),
    ("digest",),
    ("reference",),
    ("oci",),
    ("multiarch",),
    ("image", "changeset"),
    ("tree", "record"),
    ("apply",),
    ("contracts",),
    # rules: pure
    ("document", "tags", "budget"),
    ("wish",),
    ("claims",),
    ("imagelist", "recipe"),
    ("wishlist",),
    ("additions",),
    ("apptainer", "mountpoints"),
    ("plan", "status", "rootfs", "listing", "layersview", "lookup", "consumers", "modulefiles"),
    ("inherited",),
    ("report",),
    # acts: thin
    ("settings", "journal", "cache", "lock", "resolve", "tar", "compression", "storing", "logs"),
    ("registry", "publish", "cvmfs", "layer", "proposal"),
    ("verify", "gc", "receipts", "predecessors", "readers", "modules", "pending"),
    ("audit", "collection"),
    # top
    ("pools",),
    ("flatten", "furnish"),
    ("survey",),
    ("bundles", "minutes", "fronts"),
    ("execute",),
    ("reconcile",),
    ("progress", "notifications", "assembly"),
    ("cli",),
    ("__main__",),
)
RULES = {"document", "tags", "wish", "claims", "imagelist", "recipe", "wishlist", "plan", "status", "rootfs", "listing"}
RULES |= {"inherited", "layersview", "multiarch", "additions", "apptainer", "mountpoints"}
RULES |= {"lookup", "consumers", "modulefiles", "budget"}
RULES |= {"report", "tree", "apply", "record", "reference", "oci", "image", "changeset", "limits", "errors"}
ACTING = {
    "os",
    "time",
    "random",
    "secrets",
    "socket",
    "subprocess",
    "threading",
    "multiprocessing",
    "httpx",
    "tempfile",
}
ACTING |= {"concurrent", "pathlib", "shutil", "structlog", "ctypes", "urllib.request", "sqlite3"}
CONCURRENT = {"threading", "multiprocessing", "concurrent.futures"}
STARTERS = ("Thread", "ThreadPoolExecutor", "ProcessPoolExecutor", "Process")

LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """The module at the top of the package that a file is, or belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "unpacker":
                found |= {f"unpacker.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return found


def test_every_module_has_its_place_in_the_layering() -> None:
    assert {module_of(p) for p in FILES} - {"__init__"} == set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    module = module_of(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "unpacker" or len(parts) < 2 or parts[1] == module or parts[1] == "__version__":
            continue
        assert LEVEL[parts[1]] <= LEVEL[module], f"{module} imports {name}, which stands above it"


@pytest.mark.parametrize("module", sorted(RULES))
def test_rules_do_no_io_and_know_no_clock_and_no_thread(module: str) -> None:
    used = {name for name in imports(PACKAGE / f"{module}.py") if name in ACTING or name.split(".")[0] in ACTING}
    assert not used


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_threads_and_processes_start_in_few_places(path: Path) -> None:
    if module_of(path) in ("survey", "pools", "layer", "cli"):
        return
    calls = {
        n.func.id
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    }
    calls |= {
        n.func.attr
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
    }
    assert not calls & set(STARTERS)
