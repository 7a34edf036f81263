"""What was saved: the Python files of a source tree, watched, copied, and sorted by who imports whom. No torch.

A tree is a dict of file -> contents; files are written as POSIX paths relative to the tree's root.
"""

import ast
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOMS = "nanodeploy/ops/"
PATTERNS = ("nanodeploy/**/*.py", "nanodeploy/ops/**/*.json", "bench/**/*.py", "bench/*.json")  # what a gate reads
NOT_KERNELS = ("__init__", "reference", "cases")

Stamp = tuple[int, int]  # mtime in ns, size
Tree = Mapping[str, bytes]


def stamps(folder: Path, pattern: str = "*.py") -> dict[str, Stamp]:
    """What tells one state of the folder's Python files from another, by path relative to the folder."""
    found = {}
    for path in folder.glob(pattern):
        try:
            stat = path.stat()
        except FileNotFoundError:  # an editor is replacing it
            continue
        found[path.relative_to(folder).as_posix()] = (stat.st_mtime_ns, stat.st_size)
    return found


def read_tree(root: Path) -> dict[str, bytes]:
    """Everything that a gate of the tree's kernels reads."""
    return {p.relative_to(root).as_posix(): p.read_bytes() for pattern in PATTERNS for p in root.glob(pattern)}


def write_tree(tree: Tree, root: Path) -> None:
    for name, content in tree.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


class Saves:
    """Tells which files under nanodeploy/ops were saved. An editor may write a file in several goes: it is told once
    the file has stayed the same from one look to the next."""

    def __init__(self, root: Path):
        self.root = root
        self.known = self.last = stamps(root / ROOMS, "**/*.py")

    def look(self) -> dict[str, bytes | None]:
        """File -> contents of what was saved and has come to rest; None: it is gone."""
        now = stamps(self.root / ROOMS, "**/*.py")
        changed = [name for name in {**self.known, **now} if now.get(name) != self.known.get(name)]
        rested = [name for name in changed if now.get(name) == self.last.get(name)]
        self.last = now
        found: dict[str, bytes | None] = {}
        for name in sorted(rested):
            try:
                content = (self.root / ROOMS / name).read_bytes()
            except FileNotFoundError:
                content = None
            if (content is None) != (name not in now) or (content is not None and len(content) != now[name][1]):
                continue  # it changed just now; the next looks will tell
            if content is None:
                del self.known[name]
            else:
                self.known[name] = now[name]
            found[ROOMS + name] = content
        return found


@functools.cache
def candidates(name: str, content: bytes) -> frozenset[str]:
    """Files that this one's imports may mean. Raises SyntaxError, and ValueError for what is no text."""
    package = name.split("/")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(content, name)):
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = above + (node.module.split(".") if node.module else [])
            modules = [base, *([*base, alias.name] for alias in node.names)]
        else:
            continue
        found |= {path for parts in modules for path in ("/".join(parts) + ".py", "/".join([*parts, "__init__.py"]))}
    return frozenset(found - {name})


def dependents(name: str, edges: Mapping[str, frozenset[str]]) -> set[str]:
    """Every file that imports this one, directly or through others. `edges`: file -> what it imports."""
    found: set[str] = set()
    todo = [name]
    while todo:
        current = todo.pop()
        new = {other for other in edges if current in edges[other]} - found
        found |= new
        todo += new
    return found


def groups(saved: Iterable[str], tree: Tree) -> list[list[str]]:
    """The saved files and all that import them, in sets that can only be loaded together, what is imported first.

    `tree` holds the files as they were saved. Raises SyntaxError or ValueError where one cannot be read.
    """
    python = {name: content for name, content in tree.items() if name.startswith("nanodeploy/") and name[-3:] == ".py"}
    edges = {name: candidates(name, content) for name, content in python.items()}
    found: list[set[str]] = []
    for name in saved:
        mine = {name} | dependents(name, edges)
        for other in [g for g in found if g & mine]:
            found.remove(other)
            mine |= other
        found.append(mine)
    return [in_order(group, edges) for group in found]


def in_order(names: set[str], edges: Mapping[str, frozenset[str]]) -> list[str]:
    """What is imported stands before what imports it."""
    done: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name not in done and name not in path:
            for other in sorted(edges[name] & names):
                visit(other, (*path, name))
            done.append(name)

    for name in sorted(names):
        visit(name, ())
    return done


def is_kernel_file(name: str) -> bool:
    """Whether a file lies in a room and is neither its reference nor its cases."""
    parts = name.removeprefix(ROOMS).split("/")
    return name.startswith(ROOMS) and len(parts) == 2 and parts[1].removesuffix(".py") not in NOT_KERNELS


def module_name(name: str) -> str:
    return name.removesuffix(".py").replace("/", ".")
