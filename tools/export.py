"""The package from nbs/lib: `nbdev_export`, then the comments behind parameters as parts of the docstrings.

`nbdev_export` puts the version of settings.ini into the package, pyproject.toml takes it from there, and here
it goes into CITATION.cff: settings.ini is the one place to change it.

In a notebook each parameter has its comment beside it. `help`, Jupyter, editors and Sphinx show docstrings
only. So in the package a docstring ends with parameters and result, in NumPy's style. nbdev knows that style
and shows nothing twice.
"""

import ast
import io
import os
import re
import tokenize
from pathlib import Path

from nbdev.config import get_config
from nbdev.doclinks import nbdev_export

ROOT = Path(__file__).resolve().parent.parent
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def comments(source: str) -> tuple:
    "`(texts, whole)`: the comments by line, and the lines that are nothing but a comment."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found = [token for token in tokens if token.type == tokenize.COMMENT]
    found = [token for token in found if not token.string.startswith("# %%")]  # where a cell begins
    texts = {token.start[0]: token.string.lstrip("# ") for token in found}
    return texts, {token.start[0] for token in found if token.line.lstrip().startswith("#")}


def comments_of(node, texts: dict, whole: set) -> list:
    "The comments above a parameter, a field or a result, and behind it."
    first = node.lineno
    while first - 1 in whole:
        first -= 1
    return [texts[line] for line in range(first, node.end_lineno + 1) if line in texts]


def arguments(function) -> dict:
    "Name -> node of what a function is called with."
    a = function.args
    found = {arg.arg: arg for arg in [*a.posonlyargs, *a.args] if arg.arg not in ("self", "cls")}
    found |= {f"*{a.vararg.arg}": a.vararg} if a.vararg else {}
    found |= {arg.arg: arg for arg in a.kwonlyargs}
    return found | ({f"**{a.kwarg.arg}": a.kwarg} if a.kwarg else {})


def parameters(node) -> dict:
    "Name -> node of what a function or a class is called with; the fields of a data class or a named tuple."
    if isinstance(node, FUNCTIONS):
        return arguments(node)
    start = [each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
    if start:
        return arguments(start[0])
    kinds = {ast.unparse(each).partition("(")[0] for each in node.decorator_list + node.bases}
    if not kinds & {"dataclass", "dataclasses.dataclass", "NamedTuple"}:
        return {}
    return {each.target.id: each for each in node.body if isinstance(each, ast.AnnAssign)}


def public(tree) -> list:
    "Functions and classes with a public name, and methods with one; nothing inside of functions."
    found = []
    for node in tree.body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"):
            found.append(node)
        if isinstance(node, ast.ClassDef):
            found += public(node)
    return found


def texts_of(node, notes: tuple, others: dict) -> dict:
    """Parameter -> its comments.

    From one that says "This and the following as for" a function of the module, they are that function's.
    """
    found, shared = {}, {}
    for name, each in parameters(node).items():
        texts = comments_of(each, *notes)
        alike = re.fullmatch(r"This and .+ as for `(\w+)`", " ".join(texts))
        if alike and alike[1] in others:
            texts, shared = [], texts_of(others[alike[1]], notes, others)
        found[name] = texts or shared.get(name, [])
    return found


def sections(node, notes: tuple, others: dict) -> list:
    "Lines on the parameters and the result of a function or class; none where nothing is said of them."
    told, result = texts_of(node, notes, others), getattr(node, "returns", None)
    told_of_result = comments_of(result, *notes) if result else []
    if not (ast.get_docstring(node) or told_of_result or any(told.values())):
        return []

    def written(annotation):
        return annotation.value if isinstance(annotation, ast.Constant) else ast.unparse(annotation)

    lines = ["", "Parameters", "----------"] if told else []
    for name, each in parameters(node).items():
        lines.append(f"{name} : {written(each.annotation)}" if each.annotation else name)
        lines += [f"    {text}" for text in told[name]]
    if told_of_result:
        lines += ["", "Returns", "-------", written(result), *(f"    {text}" for text in told_of_result)]
    return [line.replace("\\", "\\\\") for line in lines]


def documented(source: str) -> str:
    "The code of a module with what comments say of parameters, fields and results in its docstrings."
    lines, notes = source.split("\n"), comments(source)
    nodes = public(ast.parse(source))
    others = {node.name: node for node in nodes}
    for node in reversed(nodes):
        added, first = sections(node, notes, others), node.body[0]
        if not added:
            continue
        start, stop = first.lineno - 1, first.end_lineno
        text = lines[start:stop] if ast.get_docstring(node) is not None else []
        if text and not text[0].lstrip().startswith('"'):
            raise ValueError(f"{node.name}: expected a docstring in double quotes, found {text[0].strip()}")
        indent = " " * first.col_offset
        added = [(indent + line).rstrip() for line in [*added, '"""']]
        if not text:
            lines[start:start] = [f'{indent}"""{added[1].lstrip()}', *added[2:]]
            continue
        quotes = '"""' if text[0].lstrip().startswith('"""') else '"'
        text[0] = text[0].replace(quotes, '"""', 1)
        text[-1] = text[-1].rstrip().removesuffix(quotes)
        lines[start:stop] = [*(text if text[-1].strip() else text[:-1]), *added]
    return "\n".join(lines)


if __name__ == "__main__":
    os.chdir(ROOT)
    nbdev_export()
    for path in sorted(ROOT.glob("s5vh_nb/*/*.py")):
        path.write_text(documented(path.read_text(encoding="utf-8")), encoding="utf-8")
    cited = ROOT / "CITATION.cff"
    text = re.sub(r"(?m)^version: .*", f"version: {get_config().version}", cited.read_text(encoding="utf-8"))
    cited.write_text(text, encoding="utf-8")
