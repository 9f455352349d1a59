"""What runs inside of a sandbox needs the standard library only, and no newer Python than 3.9."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src/rethaw"
ALLOWED_OF_MODEL = {f"rethaw.model.{name}" for name in ("annotations", "durations", "errors", "faults", "typed")}
IN_GUEST = sorted(
    [*(SOURCE / "guest").rglob("*.py"), *(SOURCE / "channel").rglob("*.py"), SOURCE / "__init__.py"]
    + [SOURCE / "model" / name for name in ("__init__.py", "annotations.py", "durations.py", "errors.py", "typed.py")]
)


def imports(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide where they lead"
            found |= {
                f"{node.module}.{a.name}" if node.module == "rethaw.model" else str(node.module) for a in node.names
            }
    return found


def type_checking_only(tree: ast.Module) -> ast.Module:
    """The module without what stands under `if TYPE_CHECKING`."""

    class Drop(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST | None:
            names = {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}
            return None if "TYPE_CHECKING" in names else self.generic_visit(node)

    return Drop().visit(tree)


@pytest.mark.parametrize("path", IN_GUEST, ids=lambda p: str(p.relative_to(SOURCE)))
def test_standard_library_only(path: Path) -> None:
    tree = type_checking_only(ast.parse(path.read_text(), feature_version=(3, 9)))
    for name in imports(tree):
        top = name.split(".")[0]
        if top != "rethaw":
            assert top in sys.stdlib_module_names, f"{path}: {name}"
        elif path != SOURCE / "__init__.py":  # its names are loaded when they are used
            assert name.startswith(("rethaw.guest", "rethaw.channel")) or name in {"rethaw", *ALLOWED_OF_MODEL}, name


def test_python_3_9_can_read_it() -> None:
    for path in IN_GUEST:
        text = path.read_text()
        tree = ast.parse(text, feature_version=(3, 9))
        assert not any(isinstance(node, ast.Match) for node in ast.walk(tree)), path
        if any(isinstance(node, ast.AnnAssign | ast.FunctionDef) for node in ast.walk(tree)):
            assert "from __future__ import annotations" in text, f"{path}: X | Y in annotations would fail on 3.9"


def test_what_the_guest_writes_out_again_is_what_the_server_says() -> None:
    """The guest may not import control; the two sides share these words by value."""
    from rethaw.control import templates
    from rethaw.guest import protocol

    assert (protocol.START, protocol.AUTO) == (templates.START, templates.AUTO)
