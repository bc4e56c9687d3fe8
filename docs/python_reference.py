"""Writes docs/reference/python-api.md from the signatures and docstrings of what `import coatrt` exports.

python docs/python_reference.py
"""

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

__all__ = ["PAGE", "page"]

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reference" / "python-api.md"
_LONGEST = 110
_INTRODUCTION = """# Python

Everything the commands do is a function of `coatrt`. `import coatrt` imports neither torch nor numpy: each name is
loaded on first use. Names that are not on this page are internal. Full docstrings: `help(coatrt.train)`. Examples:
[train](../guides/train.md#in-python), [plan](../guides/plan.md#in-python),
[build](../guides/build-a-fleet.md#in-python), [checkpoints](../guides/checkpoints.md#in-python),
[deploy](../guides/deploy-python.md).

This page is generated from the code.
"""
_GROUPS = {
    "Train": "train TrainOptions load_task TaskData Checkpoint load_tokenizer Adapter Evaluator search",
    "Plan": "plan plan_fleet plans_text PlanRequest Plan AdapterDescription QuantConfig WeightFormat",
    "Devices": "device_profile device_profiles DeviceProfile probe time_cpu time_cuda time_trt environment",
    "Build": "build BundleOptions BundleResult prepare execute Target EngineCache adapt verify report",
    "Other runtimes": "export_checkpoint",
    "Run": "Bundle load_decoder RuntimeOptions load_lora encode_prompt generate Sampling Chat SwitchingDecoder",
    "Serve": "serve openai_app ServeOptions",
    "Measure": "bench measure_quality Quality save_quality",
    "Progress and errors": "drawn_progress CoatError",
}


def _defined() -> dict[str, ast.FunctionDef | ast.ClassDef]:
    """Return the definition of every exported name."""
    found = {}
    for node in ast.parse((ROOT / "coatrt" / "__init__.pyi").read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ImportFrom):
            continue
        assert node.module is not None
        parts = node.module.split(".")
        path = ROOT.joinpath(*(parts if parts[0] in ("export", "engines") else ["coatrt", *parts])).with_suffix(".py")
        for item in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(item, ast.FunctionDef | ast.ClassDef) and item.name in {alias.name for alias in node.names}:
                found[item.name] = item
    return found


def _sentence(node: ast.FunctionDef | ast.ClassDef) -> str:
    """Return the first paragraph of a docstring in one line."""
    text = (ast.get_docstring(node) or "").split("\n\n")[0]
    return re.sub(r"\s+", " ", text)


def _decorated(node: ast.FunctionDef | ast.ClassDef, name: str) -> bool:
    return any(name in ast.unparse(decorator) for decorator in node.decorator_list)


def _parameters(node: ast.FunctionDef | ast.ClassDef) -> list[str]:
    """Return the parameters of a function or of a class's construction, as the code has them."""
    if isinstance(node, ast.ClassDef):
        if not _decorated(node, "dataclass"):
            inits = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
            return _parameters(inits[0]) if inits else []
        fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
        names = [ast.unparse(item.target) for item in fields]
        if len(fields) > 12:
            return [name for name in names if not name.startswith("_")]
        shown = (ast.unparse(item) for item, name in zip(fields, names, strict=True) if not name.startswith("_"))
        return [re.sub(r" = field\(.*", " = …", text) for text in shown]
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    without = len(positional) - len(arguments.defaults)
    parts = []
    for i, argument in enumerate(positional):
        if argument.arg not in ("self", "cls"):
            default = arguments.defaults[i - without] if i >= without else None
            parts.append(ast.unparse(argument) + (f" = {ast.unparse(default)}" if default is not None else ""))
    if arguments.vararg:
        parts.append(f"*{ast.unparse(arguments.vararg)}")
    elif arguments.kwonlyargs:
        parts.append("*")
    for argument, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parts.append(ast.unparse(argument) + (f" = {ast.unparse(value)}" if value is not None else ""))
    if arguments.kwarg:
        parts.append(f"**{ast.unparse(arguments.kwarg)}")
    return parts


def _signature(name: str, node: ast.FunctionDef | ast.ClassDef) -> str:
    """Return name, parameters and result, on several lines where one is too long."""
    result = f" -> {ast.unparse(node.returns)}" if isinstance(node, ast.FunctionDef) and node.returns else ""
    parts = _parameters(node)
    line = f"coatrt.{name}({', '.join(parts)}){result}"
    if len(line) <= _LONGEST:
        return line
    if all(re.fullmatch(r"\w+", part) for part in parts):
        return f"coatrt.{name}(…){result}    # fields: help(coatrt.{name})"
    return f"coatrt.{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){result}"


def _members(name: str, node: ast.ClassDef) -> Iterator[str]:
    """Yield a line for every public method and property."""
    for item in node.body:
        if not isinstance(item, ast.FunctionDef) or item.name.startswith("_"):
            continue
        names = [re.split(r"[:= ]", part)[0] for part in _parameters(item)]
        call = "" if _decorated(item, "property") else f"({', '.join(part for part in names if part != '*')})"
        yield f"- `{name}.{item.name}{call}`: {_sentence(item)}"


def page() -> str:
    """Return the page."""
    defined = _defined()
    sections = [_INTRODUCTION]
    placed = {name for names in _GROUPS.values() for name in names.split()}
    groups = {**_GROUPS, "More": " ".join(name for name in defined if name not in placed)}
    for title, names in groups.items():
        known = [name for name in names.split() if name in defined]
        if known:
            sections.append(f"## {title}\n")
        for name in known:
            node = defined.pop(name)
            sections.append(f"### {name}\n\n```text\n{_signature(name, node)}\n```\n\n{_sentence(node)}\n")
            if isinstance(node, ast.ClassDef) and (members := list(_members(name, node))):
                sections.append("\n".join(members) + "\n")
    return _wrapped("\n".join(sections))


def _wrapped(text: str) -> str:
    """Return the page with its prose in lines of at most 118 characters."""
    lines, inside = [], False
    for line in text.split("\n"):
        inside ^= line.startswith("```")
        if inside or len(line) <= 118:
            lines.append(line)
        else:
            indent = "  " if line.startswith("- ") else ""
            lines += textwrap.wrap(line, 118, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
