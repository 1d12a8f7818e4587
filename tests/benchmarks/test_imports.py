"""The benchmarks' modules import each other without circles, as the package's own do."""

from __future__ import annotations

from pathlib import Path

import benchmarks.machine
from tests.test_layout import imports

FOLDER = Path(benchmarks.machine.__file__).parent


def test_there_are_no_circles() -> None:
    graph = {
        path.stem: {name.partition(".")[0] for name in imports(path.read_text(), package="benchmarks")}
        for path in FOLDER.glob("*.py")
    }
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module in finished or module not in graph:
            return
        for imported in graph[module]:
            visit(imported, (*path, module))
        finished.add(module)

    assert "quality_measures" in graph["quality"]  # the graph is not empty: this import is known
    for module in graph:
        visit(module, ())
