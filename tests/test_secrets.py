"""What a run leaves: files on a list, which tell nothing of the machine, its user or its environment."""

import getpass
import json
import os
import platform
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import yaml
from bpwise.cli import cli
from click.testing import CliRunner, Result

from .conftest import Converted, SaveModel, llama_cpp_dir

TOKEN = "hf_" + "SecretSecretSecretSecretSecretSecr"
NASTY = "m\"><script>alert(1)</script><img src=x onerror=alert(1)>|[x](javascript:alert(1))`{{7*7}}`#: 'y".replace(
    "/", ""
)
ALLOWED = {
    "README.md",
    "bpwise.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "output.safetensors",
    "recipe.yaml",
    "report.csv",
    "report.html",
    "report.json",
    "report.md",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
"""All that an EXL2 output may consist of, for a model with these side files."""

ABSOLUTE = re.compile(rb"(?:/(?:home|root|tmp|private|Users|usr|var|opt|work|mnt|data)/|[A-Za-z]:\\\\)[\w.-]+")
"""Absolute paths, as they begin on systems in use. Of what is read here nothing holds one."""

ROWS = ("--rows", "2", "--row-tokens", "32")
EVALUATION = ("--eval-rows", "2", "--eval-row-tokens", "32")


@pytest.fixture(scope="module")
def checkout() -> Path:
    """llama.cpp's converter, looked for before the home directory is another."""
    return llama_cpp_dir()


@pytest.fixture
def secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What no file may hold, in an environment that has all of it."""
    home = tmp_path / "home-of-someone"
    home.mkdir()
    told = {
        "HOME": str(home),
        "USER": "user-someone",
        "LOGNAME": "user-someone",
        "HF_TOKEN": TOKEN,
        "WANDB_API_KEY": "key-of-another-service",
        "SOME_SETTING": "value-of-the-environment",
    }
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    names = {*told.values(), str(tmp_path), "home-of-someone", getpass.getuser(), platform.node()}
    # Short ones, as "root", stand in many a text.
    return [name.encode() for name in names if len(name) > 5] + [os.fsencode(Path.cwd())]


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def files(folder: Path) -> Iterator[Path]:
    yield from (path for path in sorted(folder.rglob("*")) if path.is_file())


def refuse_secrets(path: Path, secrets: list[bytes]) -> None:
    data = path.read_bytes()
    assert [secret for secret in secrets if secret in data] == [], path.name
    # Numbers of tensors may look like anything: of files with tensors the header only.
    if path.suffix == ".safetensors":
        data = data[: 8 + struct.unpack("<Q", data[:8])[0]]
    if path.suffix != ".gguf":
        assert ABSOLUTE.findall(data) == [], path.name


def test_a_run_leaves_listed_files_without_secrets(
    save_model: SaveModel, tmp_path: Path, secrets: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "made"
    made.mkdir()
    model = save_model(tmp_path / NASTY)
    measurement, plan, page = made / "m.safetensors", made / "plan.json", made / "plans.html"
    text = tmp_path / "text-of-someone.txt"
    text.write_text("".join(f"Sentence {number} is about the number {number * number}.\n" for number in range(400)))
    run("measure", model, "-o", measurement, "--formats", "exl2", "--calibration", text, *ROWS)
    run("plan", measurement, "--bpw", "4", "-o", plan, "--html", page)
    run("quantize", model, made / "out", "--bpw", "4", "--measurement", measurement, *EVALUATION)
    assert {path.name for path in made.iterdir()} == {"m.safetensors", "plan.json", "plans.html", "out", "out.work"}
    assert {path.name for path in files(made / "out.work")} == {"calibration.safetensors", "plan.json"}
    found = {path.relative_to(made / "out").as_posix() for path in files(made / "out")}
    assert found <= ALLOWED
    assert {"README.md", "bpwise.json", "config.json", "output.safetensors", "recipe.yaml", "report.html"} <= found
    for path in files(made):
        refuse_secrets(path, secrets)
    # The model's name is a stranger's, and stands in all that is shown.
    card = (made / "out" / "README.md").read_text(encoding="utf-8")
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert isinstance(yaml.safe_load(front), dict)
    for shown in (body, (made / "out" / "report.md").read_text(encoding="utf-8")):
        assert "<script>" not in shown
        assert "<img" not in shown
    for shown in (page, made / "out" / "report.html"):
        assert "<script>alert" not in shown.read_text(encoding="utf-8")
        assert "<img" not in shown.read_text(encoding="utf-8")
    json.loads((made / "out" / "report.json").read_text(encoding="utf-8"))


def test_a_gguf_file_holds_no_secrets(
    checkout: Path, converted: dict[str, Converted], tmp_path: Path, secrets: list[bytes]
) -> None:
    pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")
    made = tmp_path / "made"
    made.mkdir()
    model = converted["mistral"].directory
    output = made / "out.gguf"
    run("quantize", model, output, "--bpw", "9", "--llama-cpp", checkout, *ROWS, *EVALUATION)
    reports = {f"out.report.{kind}" for kind in ("csv", "html", "json", "md")}
    assert {path.name for path in made.iterdir()} == {"out.gguf", "out.gguf.work", "out.recipe.yaml", *reports}
    for path in files(made):
        refuse_secrets(path, secrets)
    reader = pytest.importorskip("gguf").GGUFReader(output)
    texts = [str(field.contents()).encode() for name, field in reader.fields.items() if "tokenizer.ggml" not in name]
    assert [found for text in texts for found in ABSOLUTE.findall(text)] == []
    del reader  # it keeps the file mapped


def test_the_hubs_errors_do_not_show_the_token(tmp_path: Path) -> None:
    # A server may repeat what it was sent, in its words about what went wrong.
    sent: set[str] = set()

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            token = str(self.headers["Authorization"])
            sent.add(token)
            body = json.dumps({"error": f"wrong token: {token}"}).encode()
            self.send_response(403 if "refused" in self.path else 500)
            self.send_header("X-Error-Message", f"wrong token: {token}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    code = """
import sys
from bpwise.cli import main
sys.argv = ["bpwise", "quantize", sys.argv[1], "out", "--bpw", "4"]
main()
"""
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        here = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path)}
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("HF_") and "proxy" not in name.lower()
        }
        for model in ("org/refused", "org/broken"):
            command = [sys.executable, "-c", code, model]
            run = subprocess.run(command, env=kept | here, cwd=tmp_path, capture_output=True, text=True, check=False)
            assert run.returncode == 1, run.stderr
            assert run.stderr.startswith(f"Error: {model}: ")
            assert TOKEN not in run.stdout + run.stderr
        server.shutdown()
    assert f"Bearer {TOKEN}" in sent
