"""The rooms of the package: imports point downwards, and there are no circles."""

import ast
from pathlib import Path

import casvit_kernels

ROOT = Path(casvit_kernels.__file__).parent
# Each may import those before it. The package's own __init__, __main__ and the version stand apart.
LAYERS = (
    ("_version", "_optional", "_files"),
    ("backends",),
    ("ops",),
    ("module", "functional"),
    ("models", "surgery", "photographs", "tokens"),
    ("testing", "benchmark"),
    ("export",),
    ("demo",),
    ("doctor",),
    ("cli",),
)


def _name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


MODULES = {_name(path): path for path in ROOT.rglob("*.py")}


def _imports(name):
    """Modules of the package that this one imports when it is imported."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    package = [p for p in package if p]
    found = set()

    def visit(body):
        for node in body:
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package[: len(package) - node.level + 1]
                target = ".".join([*base, *([node.module] if node.module else [])])
                for alias in node.names:
                    inner = ".".join(filter(None, (target, alias.name)))
                    found.add(inner if inner in MODULES else target)
            elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
                visit(node.body)
                visit(node.orelse)
            elif isinstance(node, ast.Try):
                visit(node.body)

    visit(ast.parse(path.read_text(encoding="utf-8")).body)
    return found - {name}


GRAPH = {name: _imports(name) for name in MODULES}


def test_every_import_is_known():
    assert len(GRAPH) > 60
    assert "ops.mixer.dispatch" in GRAPH["module"]
    assert all(target in MODULES for targets in GRAPH.values() for target in targets)


def test_no_circles():
    done, path = set(), []

    def walk(name):
        if name in path:
            circle = " -> ".join([*path[path.index(name) :], name])
            raise AssertionError(f"these import each other: {circle}")
        if name in done:
            return
        path.append(name)
        for target in sorted(GRAPH[name]):
            # A package is imported before what is in it: that way is no circle.
            if not name.startswith(f"{target}.") and target != "":
                walk(target)
        path.pop()
        done.add(name)

    for name in sorted(GRAPH):
        walk(name)


def test_imports_point_downwards():
    rank = {room: i for i, layer in enumerate(LAYERS) for room in layer}
    rooms = {name: name.split(".")[0] for name in GRAPH if name not in ("", "__main__")}
    assert set(rooms.values()) <= set(rank), "a new room: give it a place in LAYERS"
    wrong = [
        f"{name} imports {target}"
        for name, room in rooms.items()
        for target in GRAPH[name]
        if target and rank[target.split(".")[0]] > rank[room]
    ]
    assert wrong == []


def test_the_reference_stands_alone():
    assert GRAPH["ops.mixer.reference"] == {"ops.mixer.weights"}
    backends = [target for name in GRAPH if name.startswith("backends") for target in GRAPH[name]]
    assert not any(target.startswith("ops") for target in backends)
