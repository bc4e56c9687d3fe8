"""The process that renders chat templates: they are programs of others, and only a process can be stopped.

Run as a file by `coatrt.data.chat_template`. It reads JSON lines from standard input: first the template with its
special tokens, then lists of renderings; it answers each with a line. It imports jinja2 and no part of coatrt.
"""

import json
import os
import signal
import sys
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MEMORY = 4 << 30  # address space in bytes, where the system has such a limit
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names a message's reasoning goes by; templates read the first, some the second."""


class _Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %}, which marks what the assistant says, renders what is in it."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own, a set

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Any) -> Any:
        return caller()


class _Dict:
    """`dict` of a template, without the attributes of the class."""

    def __call__(self, *values: Any, **more: Any) -> dict[Any, Any]:
        return dict(*values, **more)

    def fromkeys(self, *values: Any) -> dict[Any, Any]:
        return dict.fromkeys(*values)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` of a template, without names that reach into Python."""

    def __init__(*values: Any, **more: Any) -> None:  # so that a template may have a name "self"
        self, given = values[0], dict(*values[1:], **more)
        for name in given:
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot have the name {name!r}; rename it")


def _refuse(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def _json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(format: str) -> str:
    return datetime.now().strftime(format)


def _compiled(source: str) -> jinja2.Template:
    """Return a template with the settings, filters and names that transformers gives it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": _now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(source)


def _limit() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it ends this process by closing the pipe
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    except (ImportError, ValueError, OSError):
        pass  # of another system: time and length are limited all the same


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with its reasoning under both names that templates read."""
    reasoning = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _rendered(templates: list[jinja2.Template], given: dict[str, Any], wanted: dict[str, Any], most: int) -> Any:
    try:
        if not templates:
            templates.append(_compiled(given["template"]))
        text = templates[0].render(
            **{
                **given["special"],
                "messages": [_with_reasoning(message) for message in wanted["messages"]],
                "tools": wanted["tools"],
                "documents": None,
                "add_generation_prompt": wanted["prompt"],
            }
        )
    except MemoryError:
        return {"error": "it takes too much memory"}
    except RecursionError:
        return {"error": "it calls itself without end"}
    except Exception as error:
        named = type(error).__name__ in ("TemplateError", "TemplateRuntimeError")  # what templates say themselves
        return {"error": str(error) if named else f"{type(error).__name__}: {error}"}
    return {"text": text} if len(text) <= most else {"error": f"it writes more than {most} characters"}


def main() -> None:
    """Answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what libraries print is no answer
    given = json.loads(sys.stdin.readline())
    _limit()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    compiled: list[jinja2.Template] = []  # by the first rendering, whose time is limited
    for line in sys.stdin:
        asked = json.loads(line)
        made = [_rendered(compiled, given, wanted, asked["most"]) for wanted in asked["renderings"]]
        print(json.dumps(made), file=answers, flush=True)


if __name__ == "__main__":
    main()
