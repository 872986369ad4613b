"""Renders chat templates in a process of its own, with limits of time, memory and length.

A template is a program that comes with a model. Jinja's sandbox keeps it from files and from the network, but not from
looping for ever or from filling the memory. One process renders all chats; it imports Transformers without torch, and
its text is what ``tokenizer.apply_chat_template`` gives.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ...errors import CalibrationError, reason

__all__ = ["ChatTemplate", "RefusedChatError", "serve"]

_CHAT_SECONDS = 2.0
"""Processor time for one chat, where the system has a timer for it (not on Windows); real ones take milliseconds."""

_WAIT_SECONDS = 20.0
"""Wall time for one chat, on whatever system; processors may be busy otherwise."""

_START_SECONDS = 120.0
"""Wall time until the process is ready: mostly an import, which may come from a slow disk."""

_MEMORY_BYTES = 512 << 20
"""Memory that rendering may take beyond the process itself, where the system can limit it (Linux)."""

_MOST_CHARACTERS = 1 << 20
_MOST_GROWTH = 16
"""Longest text of one chat: so many characters, and so many more for each of its turns as JSON."""

_PROBLEMS = {
    "damaged": "the chat template is not valid ({reason}). Get chat_template.jinja or tokenizer_config.json again.",
    "refused": "the chat template refuses the chat ({reason}). Repair or remove the row.",
    "failed": "the chat template fails on the chat ({reason}). Repair the template, or remove the row.",
    "time": f"the chat template takes more than {_CHAT_SECONDS:g} s for one chat. Repair the template.",
    "memory": f"the chat template takes more than {_MEMORY_BYTES >> 20} MiB for one chat. Repair the template.",
    "length": "the chat template makes {reason} characters of one chat, out of all proportion. Repair the template.",
    "ended": "the process that renders the chat template ended with exit code {reason}. Run again.",
}


_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class RefusedChatError(CalibrationError):
    """The template does not take a chat as it is; it may take it in another form."""


class ChatTemplate:
    """A model's chat template. The first chat starts its process; ``close`` ends it.

    Attributes:
        source: The template, in Jinja's language.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, Any]) -> None:
        """Take a template; nothing is run.

        Args:
            source: The template.
            special_tokens: What the template sees beside the turns: ``bos_token`` and so on.
        """
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ChatTemplate:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the process."""
        self.close()

    def render(
        self,
        turns: Sequence[Mapping[str, Any]],
        where: str,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        **seen: Any,
    ) -> str:
        """Return the text of one chat, as ``tokenizer.apply_chat_template(turns, tokenize=False)`` gives it.

        Args:
            turns: Objects with ``role``, ``content`` and whatever else the template reads. Entries that are None are
                left out, as Transformers does.
            where: Begins the message of an error.
            add_generation_prompt: As in Transformers.
            continue_final_message: As in Transformers.
            **seen: What else the template sees: ``tools``, ``enable_thinking``.

        Raises:
            RefusedChatError: The template refuses the turns, or fails on them.
            CalibrationError: The template is not valid, or takes too much time or memory.
        """
        flags = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        return str(self._rendered(turns, where, **flags, **seen)["text"])

    @property
    def marks_answers(self) -> bool:
        """Whether the template itself says which text is the assistant's, by ``{% generation %}``."""
        return _MARKS_ANSWERS.search(self.source) is not None

    def render_marked(
        self, turns: Sequence[Mapping[str, Any]], where: str, **seen: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of one chat, and where in it everything begins and ends that the template marks as answers.

        Arguments and errors are those of ``render``.
        """
        reply = self._rendered(turns, where, return_assistant_tokens_mask=True, **seen)
        return str(reply["text"]), [(int(start), int(end)) for start, end in reply["answers"]]

    def _rendered(self, turns: Sequence[Mapping[str, Any]], where: str, **seen: Any) -> dict[str, Any]:
        turns = [{key: value for key, value in turn.items() if value is not None} for turn in turns]
        if self._process is None:
            self._process = _start()
            reply = self._ask({"chat_template": self.source, **self._special_tokens}, _START_SECONDS)
            if "problem" in reply:
                self.close()
                raise _error(where, reply)
        reply = self._ask({"conversations": [turns], **seen}, _WAIT_SECONDS)
        if "problem" in reply:
            raise _error(where, reply)
        return reply

    def close(self) -> None:
        """End the process, if it runs. Another chat would start it again."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        # Not all systems can wait for a pipe with a limit, but the end of the process ends the waiting.
        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            process.stdin.write(json.dumps(request, default=_placeholder).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:  # the process has left the pipe
            line = b""
        finally:
            timer.cancel()
        if line:
            reply: dict[str, Any] = json.loads(line)
            return reply
        code = process.wait()
        self.close()
        out_of_time = late.is_set() or (hasattr(signal, "SIGPROF") and code == -signal.SIGPROF)
        return {"problem": "time" if out_of_time else "ended", "reason": code}


def _start() -> subprocess.Popen[bytes]:
    # The modules are those that this process finds, wherever it was started; the current directory is not among them.
    code = f"import sys; sys.path[:] = sys.argv[1:]; from {__name__} import serve; serve()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, sys.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
    )


def _placeholder(value: Any) -> str:
    # Tables hold dates, images and the like: what Transformers shows to a template in their place.
    return f"<{type(value).__name__}>"


def _error(where: str, reply: Mapping[str, Any]) -> CalibrationError:
    kind = RefusedChatError if reply["problem"] in ("refused", "failed") else CalibrationError
    return kind(f"{where}: {_PROBLEMS[reply['problem']].format(reason=reply.get('reason'))}")


def serve() -> None:
    """Render chats that come as lines of JSON, until there are no more; runs in the process of its own.

    The first line holds the template and what it sees beside the turns, each other line one chat. Every line is
    answered by one: ``text``, or ``problem`` and ``reason``.
    """
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = io.StringIO()  # whatever an import prints is no reply
    from transformers.utils.chat_template_utils import render_jinja_template  # noqa: PLC0415 - half a second

    settings = json.loads(requests.readline())
    _limit_memory()

    def render(line: bytes) -> bytes:
        texts, answers = render_jinja_template(**settings, **json.loads(line))
        text = "".join(texts)
        if len(text) > _MOST_CHARACTERS + _MOST_GROWTH * len(line):
            return _reply(problem="length", reason=len(text))
        return _reply(text=text, answers=answers[0] if answers else [])

    line = b'{"conversations": []}'  # only compiles the template
    while line:
        replies.write(_answered(render, line))
        replies.flush()
        line = requests.readline()


def _answered(render: Callable[[bytes], bytes], line: bytes) -> bytes:
    import jinja2  # noqa: PLC0415 - the process that asks does not need it

    try:
        if sys.platform != "win32":
            signal.setitimer(signal.ITIMER_PROF, _CHAT_SECONDS)  # its signal ends the process
        return render(line)
    except MemoryError:
        return _reply(problem="memory")
    except jinja2.TemplateSyntaxError as error:
        return _reply(problem="damaged", reason=reason(error))
    except jinja2.TemplateError as error:
        return _reply(problem="refused", reason=reason(error))
    except Exception as error:  # a template is a program: it raises whatever Python can raise
        return _reply(problem="failed", reason=f"{type(error).__name__}: {reason(error)}")
    finally:
        if sys.platform != "win32":
            signal.setitimer(signal.ITIMER_PROF, 0)


def _reply(**entries: Any) -> bytes:
    return json.dumps(entries).encode() + b"\n"


def _limit_memory() -> None:
    if sys.platform == "linux":
        import resource  # noqa: PLC0415 - not on Windows

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        most = pages * resource.getpagesize() + _MEMORY_BYTES
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
