"""A Hub on this machine whose answers a document holds: wrong sizes, hashes, redirects, bodies cut or without end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat
from pathlib import Path
from random import Random
from threading import Thread
from typing import Any
from unittest import mock

from bpwise.checkpoint.source import hub

from .mutations import mutated_json

__all__ = [
    "UNANNOUNCED_BYTES",
    "answers_of",
    "check_answers",
    "data_set_answers_of",
    "local_hub",
    "lying_hub",
    "mutated_answers",
]

COMMIT = "a" * 40

_PIECE = b"0" * (1 << 16)
_PIECES = 64
"""What comes after a body of a length that was not told; after a file's without end."""

UNANNOUNCED_BYTES = 1 << 20
"""In the place of bpwise's own limit, so that it is reached at once."""


def answers_of(files: dict[str, bytes], repo: str = "org/name") -> bytes:
    """Return the answers of an honest Hub that has one repository, as JSON.

    Args:
        files: Its files by name.
        repo: Its id.
    """
    info = {"id": repo, "sha": COMMIT, "private": True, "siblings": [{"rfilename": name} for name in files]}
    tree = [
        {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": name}
        for name, data in files.items()
    ]
    link = f"https://huggingface.co/{repo}"
    commit = {"commitUrl": f"{link}/commit/{COMMIT}", "commitOid": COMMIT, "pullRequestUrl": None}
    preupload = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in files]}
    answers = {
        f"GET /api/models/{repo}/revision/main": _answer(info),
        f"GET /api/models/{repo}/tree/{COMMIT}": _answer(tree),
        f"GET /api/models/{repo}": _answer(info),
        "POST /api/repos/create": _answer({"url": link, "id": repo}),
        "POST /api/validate-yaml": _answer({"errors": [], "warnings": []}),
        f"POST /api/models/{repo}/preupload/main": _answer(preupload),
        f"POST /api/models/{repo}/commit/main": _answer(commit),
    }
    for name, data in files.items():
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        answers[f"GET /{repo}/resolve/{COMMIT}/{name}"] = _answer(data.decode("latin-1"), headers)
    return json.dumps(answers).encode()


def data_set_answers_of(files: dict[str, bytes], repo: str = "org/data") -> bytes:
    """Return the answers of an honest Hub that has one data set, as JSON.

    Args:
        files: Its files by name, its card among them.
        repo: Its id.
    """
    known = json.loads(answers_of(files, f"{repo}"))
    tree = known[f"GET /api/models/{repo}/tree/{COMMIT}"]
    answers = {
        f"GET /api/datasets/{repo}/revision/{COMMIT}": known[f"GET /api/models/{repo}"],
        f"GET /api/datasets/{repo}/tree/{COMMIT}": tree,
        f"GET /api/datasets/{repo}/tree/{COMMIT}/data": _answer([]),
        f"GET /datasets/{repo}/resolve/main/README.md": known[f"GET /{repo}/resolve/{COMMIT}/README.md"],
    }
    for name in files:
        answers[f"GET /datasets/{repo}/resolve/{COMMIT}/{name}"] = known[f"GET /{repo}/resolve/{COMMIT}/{name}"]
    return json.dumps(answers).encode()


def _answer(body: Any, headers: dict[str, str] | None = None) -> dict[str, Any]:
    return {"status": 200, "headers": headers or {}, "body": body, "ends": "whole"}


_STATUSES = (204, 301, 302, 307, 401, 403, 404, 416, 429, 500, 503, 599)
_PLACES = ("/elsewhere", "//", "file:///etc/passwd", "http://127.0.0.1:1/a", "\x1b")
_SAID = ("\x1b[31mno" * 5000, "hf_" + "a" * 34, "no")
_HEADERS = ("ETag", "X-Repo-Commit", "X-Linked-Size", "X-Linked-ETag", "Content-Encoding", "Link", "X-Error-Code")
_VALUES = ("", "../../x", "-1", str(2**63), "1", "gzip", '"' + "0" * 64 + '"', "x" * 5000, "GatedRepo")


def mutated_answers(data: bytes, rng: Random, *, endless: bool = True) -> bytes:
    """Change one or two answers: status, a header, the body, or how it ends; it may be without end."""
    answers = json.loads(data)
    for _ in range(rng.choice((1, 1, 2))):
        path = rng.choice(sorted(answers))
        answer = answers[path]
        here = path.split()[1]
        kind = rng.randrange(8)
        if kind == 0:
            answer["status"] = rng.choice(_STATUSES)
            answer["headers"] |= {"Location": rng.choice((here, *_PLACES)), "X-Error-Message": rng.choice(_SAID)}
        elif kind == 1:
            answer["headers"][rng.choice(_HEADERS)] = rng.choice((*_VALUES, f'<{here}>; rel="next"'))
        elif kind == 2:
            answer["ends"] = rng.choice(("cut", "short", "long", "closed", *["overlong"] * endless))
        elif kind == 3:
            answer["status"] = 404
        elif isinstance(answer["body"], str):
            text, at = answer["body"], rng.randrange(len(answer["body"]) + 1)
            answer["body"] = rng.choice((text[:at], text * 2, "", "<html>", f"{text[:at]}x{text[at + 1 :]}"))
        else:
            answer["body"] = _parsed(mutated_json(json.dumps(answer["body"]).encode(), rng))
    return json.dumps(answers).encode()


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return data.decode("latin-1")


def check_answers(data: bytes) -> None:
    """Raise ``ValueError`` unless the first answer, what files a repository has, is JSON that comes whole."""
    (name,) = [each for each in json.loads(data) if "/revision/" in each]
    answer = json.loads(data)[name]
    if answer["status"] != 200 or answer["ends"] != "whole" or isinstance(answer["body"], str):
        raise ValueError("no answer")


@contextmanager
def lying_hub(answers: Path, cache: Path) -> Iterator[None]:
    """Let the Hub's client ask a server of its own that gives the answers of a file.

    Args:
        answers: File of the answers.
        cache: As of ``local_hub``.
    """
    known = json.loads(answers.read_bytes())

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            _ = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            method = "GET" if self.command == "HEAD" else self.command
            answer = known.get(f"{method} {self.path.partition('?')[0]}")
            self._send({"status": 404, "headers": {}, "body": "", "ends": "whole"} if answer is None else answer)

        do_HEAD = do_POST = do_GET

        def _send(self, answer: dict[str, Any]) -> None:
            text = isinstance(answer["body"], str)
            body = (answer["body"] if text else json.dumps(answer["body"])).encode("latin-1", "replace")
            ends = answer["ends"]
            self.send_response(answer["status"])
            for name, value in answer["headers"].items():
                self.send_header(name, value.replace("\n", " ").encode("latin-1", "replace").decode("latin-1"))
            claimed = len(body) + {"short": -1, "long": 1, "cut": 1}.get(ends, 0)
            if ends != "overlong":
                self.send_header("Content-Length", str(max(0, claimed)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True
            if self.command == "HEAD" or ends == "closed":
                return
            self.wfile.write(body[: len(body) // 2] if ends == "cut" else body)
            pieces = repeat(_PIECE) if "/resolve/" in self.path else repeat(_PIECE, _PIECES)
            for piece in pieces if ends == "overlong" else ():
                self.wfile.write(piece)  # until the client is gone

        def log_message(self, *_: object) -> None:
            pass

    with local_hub(Hub, cache):
        yield


@contextmanager
def local_hub(handler: type[BaseHTTPRequestHandler], cache: Path) -> Iterator[None]:
    """Let the Hub's client, with short limits and without pauses, ask a server on this machine.

    Args:
        handler: Answers the requests.
        cache: In the place of the user's cache.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass

    with Server(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        here = f"http://127.0.0.1:{server.server_port}"
        with (
            mock.patch.multiple(
                constants,
                ENDPOINT=here,
                HUGGINGFACE_CO_URL_TEMPLATE=here + "/{repo_id}/resolve/{revision}/{filename}",
                HF_HUB_OFFLINE=False,
                HF_HUB_CACHE=str(cache),
                HF_HUB_ETAG_TIMEOUT=1,
                HF_HUB_DOWNLOAD_TIMEOUT=1,
            ),
            mock.patch.object(_http.time, "sleep"),
            mock.patch.object(hub, "_UNANNOUNCED_BYTES", UNANNOUNCED_BYTES),
        ):
            try:
                yield
            finally:
                server.shutdown()
