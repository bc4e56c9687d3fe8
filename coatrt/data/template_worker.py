"""The process that renders chat templates: they are programs of others, and only a process can be stopped.

Run as a file by `coatrt.data.chat_template`. It reads JSON lines from standard input: first the template with its
special tokens, then lists of renderings; it answers each with a line. It imports neither torch nor coatrt.
"""

import json
import os
import signal
import sys
from typing import Any

_MEMORY = 4 << 30  # address space in bytes, where the system has such a limit


def _limit() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it ends this process by closing the pipe
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    except (ImportError, ValueError, OSError):
        pass  # of another system: time and length are limited all the same


def _rendered(given: dict[str, Any], wanted: dict[str, Any], most: int) -> dict[str, str]:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        (text,), _ = render_jinja_template(
            **{
                **given["special"],
                "conversations": [wanted["messages"]],
                "tools": wanted["tools"],
                "chat_template": given["template"],
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
    sys.modules["torch"] = None  # type: ignore[assignment] # seconds to import, and no template needs it
    given = json.loads(sys.stdin.readline())
    try:
        import transformers.utils.chat_template_utils  # noqa: F401

        _limit()
        print(json.dumps({"ready": True}), file=answers, flush=True)
    except Exception as error:
        print(json.dumps({"error": str(error)}), file=answers, flush=True)
        return
    for line in sys.stdin:
        asked = json.loads(line)
        made = [_rendered(given, wanted, asked["most"]) for wanted in asked["renderings"]]
        print(json.dumps(made), file=answers, flush=True)


if __name__ == "__main__":
    main()
