"""Chat templates: programs that come with a model, rendered in a separate process with limits on time and length."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from coatrt.errors import ConfigError, reason

__all__ = ["ChatTemplate", "Refusal", "Rendering", "chat_template"]

_SECONDS = 10.0  # for the renderings of one conversation, each of which takes a millisecond
_START_SECONDS = 120.0
_CHARACTERS = 1 << 24  # of one rendering
_WORKER = Path(__file__).with_name("template_worker.py")


@dataclass(frozen=True)
class Rendering:
    """A request to render messages.

    Args:
        messages: objects with role, content and any other key for the template.
        tools: function descriptions.
        prompt: whether to add the generation prompt, the opening of the assistant's next message.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    prompt: bool = False


@dataclass(frozen=True)
class Refusal:
    """The reason why a template failed to render a request."""

    reason: str


class ChatTemplate:
    """A chat template, rendered in a process that is killed when it takes too long.

    Args:
        template: its source.
        special: special tokens that templates may use, JSON of name → text.
        place: where the tokenizer is, for messages.
    """

    def __init__(self, template: str, special: str, place: str) -> None:
        self.source, self.place = template, place
        self._setup = json.dumps({"template": template, "special": json.loads(special)})
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def render(self, renderings: Sequence[Rendering]) -> list[str | Refusal]:
        """Return the text or the refusal of each rendering.

        Raises:
            ConfigError: the process cannot be started.
        """
        requests = [
            {"messages": list(r.messages), "tools": list(r.tools) or None, "prompt": r.prompt} for r in renderings
        ]
        try:
            question = json.dumps({"most": _CHARACTERS, "renderings": requests})
        except (RecursionError, ValueError, TypeError) as error:
            return [Refusal(f"its data cannot be passed to a template: {error}")] * len(renderings)
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
            answer = self._ask(self._process, question, _SECONDS)
        if answer is None:
            return [Refusal(f"it does not end within {_SECONDS:g} s, or needs too much memory")] * len(renderings)
        return [
            result["text"] if "text" in result else Refusal(" ".join(result["error"].split())[:300])
            for result in answer
        ]

    def _start(self) -> "subprocess.Popen[str]":
        paths = os.pathsep.join(path for path in sys.path if path)
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER)],  # -P: no file in its folder shadows a package
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="ascii",
                env={**os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"cannot start a process for chat templates ({error}); check its permissions and the free memory"
            ) from None
        answer = self._ask(process, self._setup, _START_SECONDS)
        if answer is None or "error" in answer:
            cause = answer["error"] if answer else "it ended without an answer"
            raise ConfigError(f"the process for chat templates cannot start ({cause}); install coatrt again")
        return process

    @staticmethod
    def _ask(process: "subprocess.Popen[str]", question: str, seconds: float) -> Any:
        """Return the answer to a line, None if the process was killed or died."""
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(seconds, process.kill)
        timer.daemon = True
        timer.start()
        answer = ""
        try:
            process.stdin.write(question + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            pass  # killed during the write
        finally:
            timer.cancel()
            if not answer.endswith("\n"):
                process.kill()
                process.wait()
        return json.loads(answer) if answer.endswith("\n") else None

    def __del__(self) -> None:
        process = getattr(self, "_process", None)
        if process is not None:
            process.kill()
            process.wait()


def _place(model: str) -> str:
    """Return the file with a tokenizer's template in transformers' order, or the model if there is none."""
    files = (Path(model) / name for name in ("chat_template.jinja", "tokenizer_config.json"))
    return str(next((path for path in files if path.is_file()), model))


@lru_cache(maxsize=2)
def _cached_template(template: str, special: str, place: str) -> ChatTemplate:
    return ChatTemplate(template, special, place)


def chat_template(tokenizer: Any, *, tools: bool = False) -> ChatTemplate | None:
    """Return the chat template of a tokenizer, None if it has none.

    Args:
        tokenizer: the tokenizer.
        tools: whether functions are described; some models have a separate template for that.

    Raises:
        ConfigError: it has several templates without a default, or the template is not a text.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    place = _place(str(getattr(tokenizer, "name_or_path", "") or "the model"))
    try:
        template = tokenizer.get_chat_template(None, tools=[] if tools else None)
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"the chat template of {place} cannot be used ({reason(error)}); correct it") from None
    if not isinstance(template, str):
        raise ConfigError(f"the chat template of {place} must be a text, got {type(template).__name__}")
    return _cached_template(template, json.dumps(tokenizer.special_tokens_map, default=str), place)
