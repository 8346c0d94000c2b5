"""Which names the tests expect of the program, and whether they judge anything: decided by the text of the tests alone.

A program that defines `sorted` or `range` must not replace what the tests mean by it, so the program is asked only for names that the tests
read and that are neither their own nor builtins. If they read nothing else, the one builtin name that they read is the program's:
`assert sum(10, 15) == 25` tests a function `sum`.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

PLAIN_METHODS = frozenset(
    name for kind in (str, bytes, int, float, list, tuple, dict, set, frozenset) for name in dir(kind) if not name.startswith("_")
)


class ProgramNames(NamedTuple):
    """Names of the program: those that the tests read, and those of them that they use as classes."""

    read: frozenset[str]
    classes: frozenset[str]


def program_names(tests: str, entry_point: str | None, humaneval: bool) -> ProgramNames:
    """Names that only the program can define; for HumanEval, only its entry point. Raises SyntaxError."""
    nodes = list(ast.walk(ast.parse(tests)))
    free = _read(nodes) - _defined(nodes)
    free -= {name for name in free if _module(name, nodes)}
    ours = set() if humaneval else free - set(dir(builtins)) - {"__name__", "__file__"}
    if entry_point is not None:
        ours.add(entry_point)
    elif not ours and len(free & _functions()) == 1:
        ours = free & _functions()
    return ProgramNames(frozenset(ours), frozenset(ours & _classes(nodes)))


def modules(tests: str, own: Iterable[str]) -> dict[str, Any]:
    """Standard library modules that the tests use without importing them, as MBPP's do with `math`."""
    nodes = list(ast.walk(ast.parse(tests)))
    names = [name for name in _read(nodes) - _defined(nodes) - set(own) if _module(name, nodes)]
    return {name: importlib.import_module(name) for name in names}


def _module(name: str, nodes: list[ast.AST]) -> bool:
    return name in sys.stdlib_module_names and any(_attribute_of(node) == name for node in nodes)


def _functions() -> set[str]:
    return {name for name in dir(builtins) if callable(getattr(builtins, name)) and name.islower() and not name.startswith("_")}


def _read(nodes: list[ast.AST]) -> set[str]:
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load | ast.Del)}


def _defined(nodes: list[ast.AST]) -> set[str]:
    """Names that the tests bind themselves, in any scope."""
    names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    names |= {node.name for node in nodes if isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name}
    names |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    return names | {(node.asname or node.name).split(".")[0] for node in nodes if isinstance(node, ast.alias)}


def _attribute_of(node: ast.AST) -> str | None:
    """N, if the node is `N.attribute`."""
    return node.value.id if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) else None


def _called(node: ast.AST | None) -> str | None:
    """N, if the node is `N(...)`."""
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None


def _assigned(nodes: list[ast.AST]) -> set[str]:
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def _constructed(node: ast.AST) -> set[str | None]:
    """N, M, … if the node is `N(...)`, `-N(...)` or `N(...) + M(...)`."""
    if isinstance(node, ast.BinOp):
        return _constructed(node.left) | _constructed(node.right)
    return _constructed(node.operand) if isinstance(node, ast.UnaryOp) else {_called(node)}


def _classes(nodes: list[ast.AST]) -> set[str | None]:
    """Names that the tests use as classes: N.a, isinstance(x, N), except N, N(...).a, or v = N(...) and v.a.

    An attribute that numbers, text or containers have, too, shows nothing: a function's result may be one of these. Nor does an attribute
    of a name in lower case, such as the cache_info of a function.
    """
    attributes = [node for node in nodes if isinstance(node, ast.Attribute) and node.attr not in PLAIN_METHODS]
    found = {name for name in map(_attribute_of, attributes) if name and (name[0].isupper() or name in _assigned(nodes))}
    found |= {_called(node.value) for node in attributes}
    for node in nodes:
        if isinstance(node, ast.Assign) and any(isinstance(name, ast.Name) and name.id in found for name in node.targets):
            found |= _constructed(node.value)
        elif isinstance(node, ast.ExceptHandler):
            found |= _read(list(ast.walk(node.type))) if node.type else set()
        elif _called(node) in ("isinstance", "issubclass") and len(node.args) == 2:  # type: ignore[attr-defined]
            found |= _read(list(ast.walk(node.args[1])))  # type: ignore[attr-defined]
    return found


def last_lines(tests: str) -> frozenset[int]:
    """Lines of simple statements at the end of a `with` block: an error there skips nothing of the block."""
    blocks = [node for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.With)]
    last = [block.body[-1] for block in blocks if isinstance(block.body[-1], ast.Raise | ast.Expr | ast.Assign)]
    return frozenset(line for node in last for line in range(node.lineno, (node.end_lineno or node.lineno) + 1))


def check_tests(tests: str, entry_point: str | None, humaneval: bool) -> None:
    """Raises ValueError, with the reason, if `tests` judge nothing or nothing can pass them. `humaneval`: they define check(candidate)."""
    tree = _parsed(tests)
    roots = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    subjects = set(program_names(tests, entry_point, humaneval).read)
    if humaneval:
        function = next((node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "check"), None)
        if function is None or not _takes_one(function.args):
            raise ValueError("defines no function check(candidate)")
        roots.append(function)
        subjects |= {argument.arg for argument in [*function.args.posonlyargs, *function.args.args][:1]}
    reached = list(_reached(roots, tree))
    check_imports(reached)
    if not any(map(_judges, reached)):
        raise ValueError("runs no assert and no raise, so that every program would pass")
    if not subjects & _read(reached):
        raise ValueError("reads no name that the program is to define; entry_point can name one that is called like a builtin")


def check_imports(nodes: Iterable[ast.AST]) -> None:
    """Raises ValueError if code imports what is not in the standard library, outside `try`."""
    guarded = {id(inner) for node in nodes if isinstance(node, ast.Try) for inner in ast.walk(node)}
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in guarded:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else ["." * node.level + (node.module or "")]
            for name in names:
                if name.split(".")[0] not in sys.stdlib_module_names:
                    raise ValueError(f"imports {name}, which is not in the standard library")


def check_prompt(stub: str, entry_point: str) -> None:
    """Raises ValueError, with the reason, unless the prompt with an empty body defines `entry_point`."""
    tree = _parsed(stub)
    check_imports(list(ast.walk(tree)))
    if entry_point not in _defined(list(tree.body)):
        raise ValueError(f"does not define entry_point={entry_point!r:.80}")


def _parsed(text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"is not valid Python: {error}") from None
    except (RecursionError, MemoryError):
        raise ValueError("is nested too deeply for Python's compiler") from None


def _takes_one(arguments: ast.arguments) -> bool:
    positional = [*arguments.posonlyargs, *arguments.args]
    needed = len(positional) - len(arguments.defaults)
    return needed <= 1 and (bool(positional) or arguments.vararg is not None) and None not in [*arguments.kw_defaults, 0]


def _reached(roots: list[ast.stmt], tree: ast.Module) -> Iterator[ast.AST]:
    """All nodes that may run: those of `roots`, and of functions and classes whose names these read."""
    known = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    waiting, seen = list(roots), set(map(id, roots))
    while waiting:
        for node in ast.walk(waiting.pop()):
            yield node
            definition = known.get(node.id) if isinstance(node, ast.Name) else None
            if definition is not None and id(definition) not in seen:
                seen.add(id(definition))
                waiting.append(definition)


def _judges(node: ast.AST) -> bool:
    """Whether the node can fail: a raise, an assert of what is not a constant or a tuple, or a call of a method assert…"""
    if isinstance(node, ast.Assert):
        constant = isinstance(node.test, ast.Constant) and bool(node.test.value)
        return not constant and not (isinstance(node.test, ast.Tuple) and node.test.elts)
    return isinstance(node, ast.Raise) or (isinstance(node, ast.Attribute) and node.attr.startswith("assert"))
