"""Uploads that are cut off at every request: the same command then leaves the Hub as one that nothing disturbs."""

import base64
import hashlib
import json
import random
from copy import deepcopy
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from ..fuzz.hub import local_hub
from .commands import PUSHES, Command, Stage
from .test_points import SEED

SAMPLED = 2

Repositories = dict[str, dict[str, Any]]
"""By id: whether it is private, and its branches with their files."""


class Hub:
    """A Hub that keeps what it is sent, until it is cut off.

    Attributes:
        repositories: What it has.
        requests: How many it has heard.
        cut: Number of the request at which it is cut off, and whether it still does what that asks for; after it
            nobody is answered any more.
    """

    def __init__(self) -> None:
        self.repositories: Repositories = {}
        self.requests = 0
        self.cut: tuple[int, bool] | None = None

    def answered(self, method: str, path: str, body: bytes) -> tuple[int, Any] | None:
        """Return status and answer; None where the connection breaks."""
        self.requests += 1
        if self.cut is not None and self.requests > self.cut[0]:
            return None
        answer = self._answer(method, path, body)
        return None if self.cut is not None and self.requests == self.cut[0] and answer is not None else answer

    def handles(self, number: int) -> bool:
        return self.cut is None or number < self.cut[0] or (number == self.cut[0] and self.cut[1])

    def _answer(self, method: str, path: str, body: bytes) -> tuple[int, Any] | None:
        if not self.handles(self.requests):
            return None
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            status = 409 if name in self.repositories else 200
            private = asked.get("private", asked.get("visibility") == "private")  # in older versions, and newer
            self.repositories.setdefault(name, {"private": private, "branches": {"main": {}}})
            return status, {"url": f"https://huggingface.co/{name}", "id": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if not path.startswith("/api/"):
            _, owner, name, resolve, branch, file = path.split("/")
            assert resolve == "resolve", path
            return 200, self.repositories[f"{owner}/{name}"]["branches"][unquote(branch)][unquote(file)]
        _, _, kind, owner, name, *rest = path.split("/")
        assert kind == "models", path
        return self._of(f"{owner}/{name}", method, [unquote(each) for each in rest], body)

    def _of(self, repo: str, method: str, rest: list[str], body: bytes) -> tuple[int, Any]:
        kept = self.repositories[repo]
        branches: dict[str, dict[str, bytes]] = kept["branches"]
        match (method, *rest):
            case ("GET",):
                return 200, {"id": repo, "private": kept["private"], "siblings": []}
            case ("GET", "refs"):
                found = [{"name": each, "ref": f"refs/heads/{each}", "targetCommit": "a" * 40} for each in branches]
                return 200, {"branches": found, "converts": [], "tags": []}
            case ("GET", "tree", branch):
                entries = [
                    {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for path, data in branches[branch].items()
                ]
                return 200, entries
            case ("POST", "branch", branch):
                status = 409 if branch in branches else 200
                branches.setdefault(branch, dict(branches["main"]))
                return status, {}
            case ("POST", "preupload", _):
                files = [{**each, "uploadMode": "regular", "shouldIgnore": False} for each in json.loads(body)["files"]]
                return 200, {"files": files}
            case ("POST", "commit", branch):
                lines = [json.loads(line) for line in body.splitlines()]
                sent = [each["value"] for each in lines if each["key"] == "file"]
                branches[branch] |= {each["path"]: base64.b64decode(each["content"]) for each in sent}
                link = f"https://huggingface.co/{repo}/commit/{'a' * 40}"
                return 200, {"commitUrl": link, "commitOid": "a" * 40, "pullRequestUrl": None}
        raise AssertionError((method, rest))


def served(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            answer = hub.answered(self.command, self.path.partition("?")[0], body)
            self.close_connection = True
            if answer is None:
                return
            data = answer[1] if isinstance(answer[1], bytes) else json.dumps(answer[1]).encode()
            self.send_response(answer[0])
            for name, value in (
                ("Content-Length", str(len(data))),
                ("ETag", f'"{hashlib.sha1(data).hexdigest()}"'),
                ("X-Repo-Commit", "a" * 40),
                ("Connection", "close"),
            ):
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_POST = do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def pushed(stage: Stage, command: Command, hub: Hub, cache: Path, cut: tuple[int, bool] | None) -> int:
    """Run a command against a Hub; return its exit code. One that ends early must say so in a sentence."""
    hub.requests, hub.cut = 0, cut
    with local_hub(served(hub), cache):
        done = stage.run(command)
    assert isinstance(done.exception, SystemExit | None), (cut, done.exception)
    assert done.exit_code == 0 or done.stderr.splitlines()[-1].startswith("Error: org/"), (cut, done.stderr)
    return done.exit_code


def cut_off(stage: Stage, command: Command, cache: Path, sample: int | None) -> tuple[int, list[str]]:
    """Cut a command off at requests, each before and after it is heard; return how many, and what goes wrong."""
    stage.begin(command)
    whole = Hub()
    assert pushed(stage, command, whole, cache, None) == 0
    assert all(each["private"] for each in whole.repositories.values())
    expected, requests = deepcopy(whole.repositories), whole.requests
    assert pushed(stage, command, whole, cache, None) == 0
    assert whole.repositories == expected
    points = [(number, heard) for number in range(1, requests + 1) for heard in (False, True)]
    if sample is not None:
        points = random.Random(SEED).sample(points, sample)
    faults = []
    for point in points:
        hub = Hub()
        pushed(stage, command, hub, cache, point)
        for repo, kept in hub.repositories.items():
            for branch, files in kept["branches"].items():
                if files not in ({}, expected[repo]["branches"][branch], expected[repo]["branches"]["main"]):
                    faults.append(f"{point}: {repo} {branch} holds a part of what it should")
        if pushed(stage, command, hub, cache, None) != 0 or hub.repositories != expected:
            faults.append(f"{point}: the Hub is left otherwise")
    return len(points), faults


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    return tmp_path / "cache"


@pytest.mark.parametrize("command", PUSHES, ids=lambda command: command.name)
def test_some_uploads_that_are_cut_off(command: Command, stage: Stage, small: Path) -> None:
    _, faults = cut_off(stage, command, small, SAMPLED)
    assert faults == []


@pytest.mark.crash
@pytest.mark.parametrize("command", PUSHES, ids=lambda command: command.name)
def test_uploads_that_are_cut_off(
    command: Command, stage: Stage, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tried, faults = cut_off(stage, command, small, None)
    with capsys.disabled():
        print(f"\n{command.name}: cut off {tried} times, wrong {len(faults)}")
    assert faults == []
