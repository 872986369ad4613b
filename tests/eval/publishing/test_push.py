"""Uploads, against a Hub that only takes notes."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.cli import cli
from bpwise.convert.exl2.file.writer import write_model
from bpwise.eval.publishing.mark import mark_broken
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from ...rounded import random_linear

REPORT = {
    "original": {"name": "L", "stored_bytes": 9},
    "quantized": {"name": "L", "stored_bytes": 4},
    "summary": {
        "original_perplexity": {"value": 10.0, "standard_error": None},
        "quantized_perplexity": {"value": 11.0, "standard_error": None},
        "kl_nats": {"value": 0.0125, "standard_error": 0.001},
        "kl_p99_nats": 0.5,
        "top1_agreement": {"value": 0.94, "standard_error": None},
    },
    "predicted_tokens": 100,
    "text": "text",
    "text_fingerprint": "abc",
    "engine": "engine",
    "dtype": "float32",
}
CHART = "kl-against-size.png"
"""Of a front page, where its renderer is installed."""
CARD = "---\ntags: [exl2]\n---\n\n# Llama-3.2-1B-4.0bpw-4hb-exl2\n\nWords.\n"


@dataclass
class FakeHub:
    """Takes the place of ``HfApi``."""

    public: set[str] = field(default_factory=set)
    repos: dict[str, bool] = field(default_factory=dict)
    branches: list[tuple[str, str]] = field(default_factory=list)
    commits: list[tuple[str, str | None, dict[str, Any]]] = field(default_factory=list)
    stored: dict[str | None, dict[str, Path]] = field(default_factory=dict)
    """Files that the one repository has before, by branch and name."""
    failure: Exception | None = None

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        if self.failure is not None:
            raise self.failure
        self.repos.setdefault(repo, private and repo not in self.public)

    def repo_info(self, repo: str) -> Any:
        return SimpleNamespace(private=self.repos[repo])

    def create_branch(self, repo: str, *, branch: str, exist_ok: bool) -> None:
        assert exist_ok
        self.branches.append((repo, branch))

    def list_repo_refs(self, repo: str) -> Any:
        return SimpleNamespace(branches=[SimpleNamespace(name=branch or "main") for branch in self.stored])

    def list_repo_tree(self, repo: str, *, revision: str | None) -> list[Any]:
        files = self.stored.get(None if revision == "main" else revision, {})
        return [SimpleNamespace(path=name, size=path.stat().st_size) for name, path in files.items()]

    def hf_hub_download(self, repo: str, name: str, *, revision: str | None) -> str:
        return str(self.stored[revision][name])

    def create_commit(self, repo: str, operations: Any, *, commit_message: str, revision: str | None) -> Any:
        assert commit_message.startswith("Upload ")
        files = {
            each.path_in_repo: each.path_or_fileobj
            if isinstance(each.path_or_fileobj, bytes)
            else Path(each.path_or_fileobj)
            for each in operations
        }
        self.commits.append((repo, revision, files))
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo}/commit/0")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    return fake


@pytest.fixture
def output(make_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A small EXL2 model with all that a run leaves, under a name that is none by convention."""
    source = Checkpoint.open(make_model("original"))

    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    names = [f"model.layers.{i}.{part}" for i in range(2) for part in parts]
    names += [f"model.layers.{i}.mlp.{part}_proj" for i in range(2) for part in ("gate", "up", "down")]
    out = tmp_path / "out"
    calibration = {"rows": 1, "length": 8, "dataset": "none"}
    write_model(
        source,
        {name: (lambda name=name: random_linear(source.shape(f"{name}.weight"))) for name in [*names, "lm_head"]},
        out,
        quantization={"version": "0.3.2", "bits": 4.0, "head_bits": 4, "calibration": calibration},
        provenance={},
    )
    (out / "README.md").write_text(CARD)
    (out / "report.md").write_text("A report.")
    (out / "report.json").write_text(json.dumps({"comparison": REPORT}))
    (out / "recipe.yaml").write_text("bpw: 4.0")
    (out / "notes.txt").write_text("private")
    (out / ".hidden").write_text("private")
    return out


def push(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["push", *map(str, arguments)], catch_exceptions=False)


PUBLISHED = {
    "README.md",
    "bpwise.json",
    "config.json",
    "generation_config.json",
    "output.safetensors",
    "recipe.yaml",
    "report.json",
    "report.md",
    "tokenizer.json",
    "tokenizer_config.json",
}


def test_one_repository_by_convention(output: Path, hub: FakeHub) -> None:
    result = push(output, "org/")
    assert result.exit_code == 0, result.stderr
    assert hub.repos == {"org/Llama-3.2-1B-4.0bpw-4hb-exl2": True}
    ((repo, branch, files),) = hub.commits
    assert (repo, branch) == ("org/Llama-3.2-1B-4.0bpw-4hb-exl2", None)
    assert files.keys() == PUBLISHED
    assert all(path == output / name for name, path in files.items())
    assert "https://huggingface.co/org/Llama-3.2-1B-4.0bpw-4hb-exl2/commit/0" in result.stdout


def test_all_side_files_and_nothing_else(output: Path, hub: FakeHub) -> None:
    wanted = {
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
        "processor_config.json",
        "video_preprocessor_config.json",
        "Notice.txt",
        "USE_POLICY.md",
        "spiece.model",
    }
    private = {"pytorch_model.bin", "original/params.json", ".git/config", "additional_chat_templates/x.py", "t.pt"}
    for name in wanted | private:
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text("{}")
    result = push(output, "org/")
    assert result.exit_code == 0, result.stderr
    ((_, _, files),) = hub.commits
    assert files.keys() == PUBLISHED | wanted
    listed = push(output, "org/", "--dry-run").stdout
    for name in ("pytorch_model.bin", "original", ".git", "additional_chat_templates/x.py", "t.pt"):
        assert f"not published: {name}\n" in listed


def test_a_linked_folder_of_templates_is_refused(output: Path, hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key.jinja").write_text("secret")
    (output / "additional_chat_templates").symlink_to(tmp_path / "private")
    result = push(output, "org/")
    assert result.exit_code == 1
    assert "leads outside" in result.stderr
    assert hub.commits == []


def test_a_name_of_ones_own_and_public(output: Path, hub: FakeHub) -> None:
    assert push(output, "org/mine", "--public").exit_code == 0
    assert hub.repos == {"org/mine": False}


def test_a_public_repository_is_not_written_to_by_accident(output: Path, hub: FakeHub) -> None:
    hub.public.add("org/mine")
    result = push(output, "org/mine")
    assert result.exit_code == 1
    assert "is public already" in result.stderr
    assert hub.commits == []


def test_branches_of_a_folder(output: Path, hub: FakeHub, tmp_path: Path) -> None:
    for rate in ("4.0", "8.0"):
        shutil.copytree(output, tmp_path / "all" / f"L-{rate}bpw-4hb-exl2")
    (tmp_path / "all" / "report.md").write_text("Both.")
    assert push(tmp_path / "all", "org/", "--branch").exit_code == 0
    assert hub.repos == {"org/L-exl2": True}
    assert hub.branches == [("org/L-exl2", "4.0bpw"), ("org/L-exl2", "8.0bpw")]
    assert [(branch, set(files) - {CHART}) for _, branch, files in hub.commits] == [
        (None, {"README.md"}),
        ("4.0bpw", PUBLISHED),
        ("8.0bpw", PUBLISHED),
    ]
    hub.repos.clear()
    assert push(tmp_path / "all", "org/").exit_code == 0
    assert set(hub.repos) == {"org/L-4.0bpw-4hb-exl2", "org/L-8.0bpw-4hb-exl2"}
    assert "would replace" in push(tmp_path / "all", "org/mine").stderr


def test_json(output: Path, hub: FakeHub) -> None:
    (dry,) = json.loads(push(output, "org/", "--dry-run", "--json").stdout)["uploads"]
    assert (dry["repo"], dry["branch"], dry["url"]) == ("org/Llama-3.2-1B-4.0bpw-4hb-exl2", None, None)
    assert {each["name"]: each["bytes"] for each in dry["files"]} == {
        name: (output / name).stat().st_size for name in PUBLISHED
    }
    assert dry["total_bytes"] == sum((output / name).stat().st_size for name in PUBLISHED)
    assert "notes.txt" in dry["not_published"]
    assert hub.commits == []
    (pushed,) = json.loads(push(output, "org/", "--json").stdout)["uploads"]
    assert pushed["url"] == f"https://huggingface.co/{pushed['repo']}/commit/0"
    assert len(hub.commits) == 1


def test_inspected_as_json(output: Path) -> None:
    found = json.loads(CliRunner().invoke(cli, ["inspect", str(output), "--json"]).stdout)
    assert found["kind"] == "EXL2 model"
    stored = load_file(output / "output.safetensors")
    assert len(found["linears"]) == 15
    for each in found["linears"]:
        assert each["rows_by_bits"] == {"4": each["in_features"]}
        bits = 8 * sum(tensor.nbytes for name, tensor in stored.items() if name.startswith(f"{each['name']}.q_"))
        assert each["bpw"] == pytest.approx(bits / each["in_features"] / each["out_features"], rel=1e-9)
    assert found["tensors_bytes"] == (output / "output.safetensors").stat().st_size


def test_dry_run(output: Path, hub: FakeHub) -> None:
    result = push(output, "org/", "--dry-run")
    assert result.exit_code == 0
    assert (hub.repos, hub.commits) == ({}, [])
    listed = {line.split()[0] for line in result.stdout.splitlines() if re.search(r"  [\d.]+ (bytes|kB)$", line)}
    assert listed == PUBLISHED
    assert "not published: notes.txt" in result.stdout
    assert "not compared" not in result.stdout
    (output / "report.md").unlink()
    (output / "report.json").unlink()
    assert "not compared with the original" in push(output, "org/", "--dry-run").stdout


def _break(output: Path) -> None:
    mark_broken(output, "It is.")


def _forget(output: Path) -> None:
    (output / "bpwise.json").unlink()


def _spoil(output: Path) -> None:
    manifest = json.loads((output / "bpwise.json").read_text())
    del manifest["sha256"]
    manifest["manifest"]["linears"]["lm_head"] = "0" * 64
    (output / "bpwise.json").write_text(json.dumps(manifest))


def _no_card(output: Path) -> None:
    (output / "README.md").unlink()


def _link(output: Path) -> None:
    (output / "report.md").unlink()
    (output / "report.md").symlink_to("/etc/hostname")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_break, "marked as broken. It is."),
        (_forget, "cannot be verified"),
        (_spoil, "decode differently: lm_head"),
        (_no_card, "no model card README.md"),
        (_link, "is a link"),
    ],
)
@pytest.mark.parametrize("options", [(), ("--dry-run",)], ids=["push", "dry-run"])
def test_refused(
    output: Path, hub: FakeHub, harm: Callable[[Path], None], message: str, options: tuple[str, ...]
) -> None:
    harm(output)
    result = push(output, "org/", *options)
    assert result.exit_code == 1
    assert message in result.stderr
    assert (hub.repos, hub.commits) == ({}, [])


@pytest.mark.parametrize("target", ["", "name", "/name", "a/b/c", "../x", "org/na me", "-x/y"])
def test_places_that_are_none(output: Path, hub: FakeHub, target: str) -> None:
    result = push(output, "--", target)
    assert result.exit_code == 1
    assert "not the name of a repository" in result.stderr
    assert hub.repos == {}


def test_nothing_to_publish(tmp_path: Path, hub: FakeHub) -> None:
    assert "no quantized model" in push(tmp_path, "org/").stderr


@pytest.mark.parametrize("failure", [OSError("no network"), huggingface_hub.errors.HFValidationError("bad")])
def test_the_hub_refuses(output: Path, hub: FakeHub, failure: Exception) -> None:
    hub.failure = failure
    result = push(output, "org/")
    assert result.exit_code == 1
    assert "hf auth login" in result.stderr


def write_gguf(path: Path, *, shape: tuple[int, int] = (2, 32), run: str | None = None) -> None:
    """Write a GGUF file of one small tensor, by the package of its makers; skips without it."""
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed: pip install '.[gguf]'")
    writer = gguf.GGUFWriter(path, "test")
    if run is not None:
        writer.add_string("bpwise.run", run)
    writer.add_tensor("a.weight", np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_files(tmp_path: Path, hub: FakeHub) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for rate in ("4.5", "6.0"):
        write_gguf(folder / f"L-{rate}bpw.gguf")
        (folder / f"L-{rate}bpw.README.md").write_text(CARD)
        (folder / f"L-{rate}bpw.report.json").write_text(json.dumps({"comparison": REPORT}))
    (folder / "L-6.0bpw.recipe.yaml").write_text("bpw: 6.0")
    assert push(folder, "org/").exit_code == 0
    assert hub.repos == {"org/L-GGUF": True}
    assert [set(files) - {CHART} for _, _, files in hub.commits] == [
        {"README.md"},
        {"L-4.5bpw.gguf", "L-4.5bpw.README.md", "L-4.5bpw.report.json"},
        {"L-6.0bpw.gguf", "L-6.0bpw.README.md", "L-6.0bpw.recipe.yaml", "L-6.0bpw.report.json"},
    ]
    assert push(folder / "L-6.0bpw.gguf", "org/").exit_code == 0
    assert "\n# L in 1 size\n" in hub.commits[-2][2]["README.md"].decode()
    (folder / "L-6.0bpw.gguf").rename(folder / "odd.gguf")
    (folder / "L-6.0bpw.README.md").rename(folder / "odd.README.md")
    assert "tells no size" in push(folder / "odd.gguf", "org/").stderr
    (folder / "odd.gguf.BROKEN.md").write_text("It is.")
    assert "marked as broken" in push(folder / "odd.gguf", "org/").stderr


@pytest.mark.parametrize("ending", ["-Q4_K_M", ".Q4_K_M", "-4.5bpw-Q4_K_M", "-UD-Q4_K_XL"])
def test_names_of_other_programs(tmp_path: Path, hub: FakeHub, ending: str) -> None:
    write_gguf(tmp_path / f"L-3.2-1B{ending}.gguf")
    (tmp_path / f"L-3.2-1B{ending}.README.md").write_text(CARD)
    assert push(tmp_path, "org/").exit_code == 0
    assert hub.repos == {"org/L-3.2-1B-GGUF": True}
    assert push(tmp_path, "org/all", "--branch").exit_code == 0
    assert hub.commits[-1][1] == ("4.5bpw" if "bpw" in ending else ending[1:])


def test_parts_of_one_model_go_together(tmp_path: Path, hub: FakeHub) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed: pip install '.[gguf]'")
    writer = gguf.GGUFWriter(tmp_path / "L-Q4_K_M.gguf", "test", split_max_tensors=1)
    for name in ("a.weight", "b.weight"):
        writer.add_tensor(name, np.ones((2, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tmp_path / "L-Q4_K_M-00001-of-00002.README.md").write_text(CARD)
    assert push(tmp_path, "org/").exit_code == 0
    assert [set(files) for _, _, files in hub.commits][1:] == [
        {"L-Q4_K_M-00001-of-00002.gguf", "L-Q4_K_M-00002-of-00002.gguf", "L-Q4_K_M-00001-of-00002.README.md"}
    ]
    (tmp_path / "L-Q4_K_M-00002-of-00002.gguf").unlink()
    assert "1 of 2 parts are missing" in push(tmp_path, "org/").stderr


def test_one_front_page_for_all_sizes(tmp_path: Path, hub: FakeHub) -> None:
    names = {"L-4.5bpw-Q4_K_S": 1, "L-4.6bpw-Q4_K_S": 2, "L-6.5bpw-Q6_K": 3}
    for name, rows in names.items():
        write_gguf(tmp_path / f"{name}.gguf", shape=(1000 * rows, 1024))
        own = f"---\nlicense: mit\n---\n\n# {name}\n\nOwn words on USER/REPO."
        (tmp_path / f"{name}.README.md").write_text(f"{own}\n\n---\n\n# The card of the original, L\n\nIts words.\n")
    (tmp_path / "L-6.5bpw-Q6_K.report.json").write_text(json.dumps({"comparison": REPORT}))
    assert push(tmp_path, "org/").exit_code == 0
    _, branch, files = hub.commits[0]
    page = files["README.md"].decode()
    assert branch is None
    assert files.keys() == {"README.md"}  # of a single measured model there is no chart
    assert page.startswith("---\nlicense: mit\n---\n")
    assert page.endswith("# The card of the original, L\n\nIts words.\n")
    assert "Own words" not in page
    table = [line.split(" | ") for line in page.splitlines() if line.startswith("| [")]
    assert [line[:2] for line in table] == [
        [f"| [{name}.gguf](<{name}.gguf>)", f"{size} MB"]
        for name, size in (("L-6.5bpw-Q6_K", "12.3"), ("L-4.6bpw-Q4_K_S", "8.2"), ("L-4.5bpw-Q4_K_S", "4.1"))
    ]
    assert table[0][2:] == ["0.0125 ± 0.001", "94 %", "close to the original |"]
    assert table[1][2:] == ["not measured", "", " |"]
    best = "[L-6.5bpw-Q6_K.gguf](<L-6.5bpw-Q6_K.gguf>), 12.3 MB: close to the original."
    same = "94 of 100 next tokens are the same."
    assert f"**The smallest that is close to the original:** {best} {same}" in page.splitlines()
    assert "**The closest:**" not in page
    taken = [line for line in page.splitlines() if "ollama run hf.co/org/L-GGUF:Q4_K_S" in line]
    assert len(taken) == 1
    assert taken[0].endswith("| L-4.5bpw-Q4_K_S.gguf |")
    assert "`llama-server -hf org/L-GGUF -hff NAME`: L-4.6bpw-Q4_K_S.gguf." in page
    assert hub.commits[1][2]["L-4.5bpw-Q4_K_S.README.md"].decode().count("Own words on org/L-GGUF.") == 1


SIZES = {"L-2.5bpw": (0.6, 1), "L-4.5bpw": (0.031, 2), "L-6.5bpw": (0.0055, 3), "L-8.5bpw": (0.0014, 4)}
"""Names, mean KL divergences in nats per token, and sizes."""


def write_sizes(folder: Path, *, measured: bool = True) -> None:
    folder.mkdir()
    for name, (kl, rows) in SIZES.items():
        write_gguf(folder / f"{name}.gguf", shape=(1000 * rows, 1024))
        (folder / f"{name}.README.md").write_text(CARD)
        summary = REPORT["summary"] | {"kl_nats": {"value": kl, "standard_error": None}}  # type: ignore[operator]
        if measured:
            report = {"comparison": REPORT | {"summary": summary}}
            (folder / f"{name}.report.json").write_text(json.dumps(report))


def test_the_front_page_says_which_one_to_take(tmp_path: Path, hub: FakeHub) -> None:
    write_sizes(tmp_path / "all")
    assert push(tmp_path / "all", "org/").exit_code == 0
    page = hub.commits[0][2]["README.md"].decode()
    # By llama.cpp's own numbers for Llama 3 8B, Q4_K_M loses 0.031 nats per token, and Q3_K_M 0.1.
    assert "**The smallest that is close to the original:** [L-4.5bpw.gguf](<L-4.5bpw.gguf>), 8.2 MB: close" in page
    assert "**The closest:** [L-8.5bpw.gguf](<L-8.5bpw.gguf>), 16.4 MB: indistinguishable in use." in page
    assert "damaged |" in next(line for line in page.splitlines() if line.startswith("| [L-2.5bpw"))
    for name in ("L-4.5bpw", "L-6.5bpw", "L-8.5bpw"):
        (tmp_path / "all" / f"{name}.gguf").unlink()
    write_gguf(tmp_path / "all" / "L-2.6bpw.gguf")
    (tmp_path / "all" / "L-2.6bpw.README.md").write_text(CARD)
    hub.commits.clear()
    assert push(tmp_path / "all", "org/").exit_code == 0
    page = hub.commits[0][2]["README.md"].decode()
    assert "None is close to the original (at most 0.04 nats per token away)." in page
    assert "**The closest:** [L-2.5bpw.gguf](<L-2.5bpw.gguf>), 4.1 MB: badly damaged." in page


def test_numbers_of_different_texts_are_not_compared(tmp_path: Path, hub: FakeHub) -> None:
    write_sizes(tmp_path / "all")
    path = tmp_path / "all" / "L-4.5bpw.report.json"
    path.write_text(path.read_text().replace('"abc"', '"other"'))
    assert push(tmp_path / "all", "org/").exit_code == 0
    files = hub.commits[0][2]
    page = files["README.md"].decode()
    assert "were measured on different texts, so their numbers cannot be compared" in page
    assert "The smallest" not in page
    assert "The closest" not in page
    assert CHART not in files


def test_a_dry_run_counts_the_front_page(tmp_path: Path, hub: FakeHub) -> None:
    write_sizes(tmp_path / "all", measured=False)
    shown = push(tmp_path / "all", "org/", "--dry-run").stdout
    assert " 0.0 MB" not in shown
    assert push(tmp_path / "all", "org/").exit_code == 0
    size = len(hub.commits[0][2]["README.md"])
    assert f"-> https://huggingface.co/org/L-GGUF: {size} bytes\n" in shown
    assert f"  README.md  {size} bytes, the front page\n" in shown


def test_the_front_page_has_a_chart(tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("resvg_py", reason="drawings become PNG files by resvg: pip install '.[png]'")
    write_sizes(tmp_path / "all")
    before = set((tmp_path / "all").iterdir())
    assert push(tmp_path / "all", "org/").exit_code == 0
    files = hub.commits[0][2]
    assert "\n![KL divergence against size](kl-against-size.png)\n" in files["README.md"].decode()
    assert files["kl-against-size.png"].startswith(b"\x89PNG\r\n\x1a\n")
    assert set((tmp_path / "all").iterdir()) == before  # it is made for the repository alone
    dry = json.loads(push(tmp_path / "all", "org/", "--dry-run", "--json").stdout)["uploads"][0]
    assert [each["name"] for each in dry["files"]] == ["README.md", "kl-against-size.png"]
    # Without the extra there is none, and no word of it.
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    hub.commits.clear()
    result = push(tmp_path / "all", "org/")
    assert (result.exit_code, result.stderr) == (0, "")
    assert hub.commits[0][2].keys() == {"README.md"}
    assert ".png" not in hub.commits[0][2]["README.md"].decode()


def test_the_front_page_lists_what_is_there_already(tmp_path: Path, hub: FakeHub) -> None:
    write_sizes(tmp_path / "all")
    before, now = tmp_path / "before", tmp_path / "now"
    before.mkdir()
    now.mkdir()
    for path in (tmp_path / "all").iterdir():
        path.rename((now if path.name.startswith("L-4.5bpw") else before) / path.name)
    (before / "L-2.5bpw.report.json").write_text("{")
    (before / "L-9.5bpw.gguf").write_text("without a card")
    (before / "a>b-4.0bpw.gguf").write_text("not a name")
    (before / "a>b-4.0bpw.README.md").write_text("a card")
    hub.stored[None] = {path.name: path for path in before.iterdir()}
    (tmp_path / "of-old").write_text("x" * 10)
    hub.stored[None]["L-4.5bpw.gguf"] = tmp_path / "of-old"  # pushed again
    hub.stored[None]["L-4.5bpw.README.md"] = tmp_path / "of-old"
    assert push(now, "org/").exit_code == 0
    page = hub.commits[0][2]["README.md"].decode()
    assert page.startswith("---\ntags: [exl2]\n---\n\n# L in 4 sizes\n")
    rows = [line.split(" | ")[:3] for line in page.splitlines() if line.startswith("| [")]
    assert rows == [
        [f"| [{name}.gguf](<{name}.gguf>)", size, kl]
        for name, size, kl in (
            ("L-8.5bpw", "16.4 MB", "0.0014"),
            ("L-6.5bpw", "12.3 MB", "0.0055"),
            ("L-4.5bpw", "8.2 MB", "0.031"),
            ("L-2.5bpw", "4.1 MB", "not measured"),
        )
    ]
    assert "**The closest:** [L-8.5bpw.gguf]" in page


def test_the_front_page_lists_branches_that_are_there_already(output: Path, hub: FakeHub, tmp_path: Path) -> None:
    files = {path.name: path for path in output.iterdir()}
    hub.stored = {None: {"README.md": output / "README.md"}, "2.0bpw": files, "4.0bpw": files, "other": {}}
    shutil.copytree(output, tmp_path / "all" / "L-4.0bpw-4hb-exl2")
    assert push(tmp_path / "all", "org/", "--branch").exit_code == 0
    page = hub.commits[0][2]["README.md"].decode()
    assert [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| [")] == [
        "| [L-4.0bpw-4hb-exl2](<https://huggingface.co/org/L-exl2/tree/4.0bpw>)",
        "| [2.0bpw](<https://huggingface.co/org/L-exl2/tree/2.0bpw>)",
    ]
    size = (output / "output.safetensors").stat().st_size
    assert page.count(f"| {size / 1e3:.1f} kB | 0.0125 ± 0.001 | 94 % |") == 2


def test_branches_of_files_are_listed_with_what_was_measured(tmp_path: Path, hub: FakeHub) -> None:
    write_sizes(tmp_path / "all")
    for path in (tmp_path / "all").glob("L-[248]*"):
        path.unlink()
    before = tmp_path / "before"
    before.mkdir()
    write_gguf(before / "L-9.5bpw.gguf", shape=(5000, 1024))
    (before / "mmproj-L-F16.gguf").write_text("x" * 500)
    (before / "README.md").write_text(CARD)
    (before / "L-9.5bpw.report.json").write_text(json.dumps({"comparison": REPORT}))
    hub.stored = {None: {}, "9.5bpw": {path.name: path for path in before.iterdir()}}
    assert push(tmp_path / "all", "org/", "--branch").exit_code == 0
    page = hub.commits[0][2]["README.md"].decode()
    row = next(line for line in page.splitlines() if line.startswith("| [9.5bpw]"))
    assert "| 0.0125 ± 0.001 | 94 % |" in row
    assert f"| {(before / 'L-9.5bpw.gguf').stat().st_size / 1e6:.1f} MB |" in row


def test_where_nothing_was_measured_predictions_are_named_so(
    output: Path, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in output.glob("report.*"):
        path.unlink()
    for rate, nats in (("4.0", 0.5), ("8.0", 0.003)):
        place = tmp_path / "all" / f"L-{rate}bpw-4hb-exl2"
        shutil.copytree(output, place)
        manifest = json.loads((place / "bpwise.json").read_text())
        del manifest["sha256"]
        manifest["provenance"]["predicted_damage_nats"] = nats
        (place / "bpwise.json").write_text(json.dumps(manifest))
    assert push(tmp_path / "all", "org/", "--branch").exit_code == 0
    files = hub.commits[0][2]
    page = files["README.md"].decode()
    assert files.keys() == {"README.md"}
    assert "None of these models was measured: the numbers are predictions of the plans." in page
    assert page.count("| 0.003 predicted |  | very close to the original |") == 1
    assert page.count("very close to the original, as predicted.") == 1
    write_sizes(tmp_path / "files", measured=False)
    hub.commits.clear()
    assert push(tmp_path / "files", "org/").exit_code == 0
    page = hub.commits[0][2]["README.md"].decode()
    assert "None of these models was measured: the largest is the closest to the original." in page


def test_the_front_page_shows_the_prompt_format(output: Path, hub: FakeHub, tmp_path: Path) -> None:
    (output / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}")
    for rate in ("4.0", "8.0"):
        shutil.copytree(output, tmp_path / "all" / f"L-{rate}bpw-4hb-exl2")
    assert push(tmp_path / "all", "org/", "--branch").exit_code == 0
    page = hub.commits[0][2]["README.md"].decode()
    assert "\n## Prompt format\n\n```text\n[system] {system_prompt}[user] {prompt}\n```\n" in page


def test_what_a_gguf_model_sees_images_with_goes_with_every_file(tmp_path: Path, hub: FakeHub) -> None:
    folder = tmp_path / "all"
    folder.mkdir()
    # Runs on one model begin alike.
    runs = {"L-4.5bpw": "0123abcd4", "L-6.0bpw": "0123abcd6", "mmproj-L-BF16": "0123abcde"}
    for name, run in runs.items():
        write_gguf(folder / f"{name}.gguf", run=run)
        if name.startswith("L"):
            (folder / f"{name}.README.md").write_text("---\n---\n")
    assert push(folder, "org/").exit_code == 0
    assert [set(files) for _, _, files in hub.commits if len(files) > 1] == [
        {"L-4.5bpw.gguf", "L-4.5bpw.README.md", "mmproj-L-BF16.gguf"},
        {"L-6.0bpw.gguf", "L-6.0bpw.README.md", "mmproj-L-BF16.gguf"},
    ]
    assert {repo for repo, _, _ in hub.commits} == {"org/L-GGUF"}
