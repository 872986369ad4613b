"""Uploads, against a Hub that only takes notes."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.cli import cli
from bpwise.convert.exl2.file.layout import RowGroup
from bpwise.convert.exl2.file.linear import QuantizedLinear
from bpwise.convert.exl2.file.writer import write_model
from bpwise.convert.publishing.mark import mark_broken
from click.testing import CliRunner, Result
from safetensors.torch import load_file

CARD = "---\ntags: [exl2]\n---\n\n# Llama-3.2-1B-4.0bpw-4hb-exl2\n\nWords.\n"


@dataclass
class FakeHub:
    """Takes the place of ``HfApi``."""

    public: set[str] = field(default_factory=set)
    repos: dict[str, bool] = field(default_factory=dict)
    branches: list[tuple[str, str]] = field(default_factory=list)
    commits: list[tuple[str, str | None, dict[str, Path]]] = field(default_factory=list)
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

    def create_commit(self, repo: str, operations: Any, *, commit_message: str, revision: str | None) -> Any:
        assert commit_message.startswith("Upload ")
        files = {each.path_in_repo: Path(each.path_or_fileobj) for each in operations}
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

    def linear(name: str) -> QuantizedLinear:
        columns, rows = source.shape(f"{name}.weight")
        rng = torch.Generator().manual_seed(1)
        return QuantizedLinear(
            groups=(RowGroup(4, rows),),
            codes=torch.randint(0, 16, (rows, columns), generator=rng, dtype=torch.uint8),
            scale_codes=torch.randint(0, 16, (1, columns), generator=rng, dtype=torch.uint8),
            max_scales=torch.full((1,), 0.1).half(),
            order=torch.randperm(rows, generator=rng),
        )

    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    names = [f"model.layers.{i}.{part}" for i in range(2) for part in parts]
    names += [f"model.layers.{i}.mlp.{part}_proj" for i in range(2) for part in ("gate", "up", "down")]
    out = tmp_path / "out"
    calibration = {"rows": 1, "length": 8, "dataset": "none"}
    write_model(
        source,
        {name: (lambda name=name: linear(name)) for name in [*names, "lm_head"]},
        out,
        quantization={"version": "0.3.2", "bits": 4.0, "head_bits": 4, "calibration": calibration},
        provenance={},
    )
    (out / "README.md").write_text(CARD)
    (out / "report.md").write_text("A report.")
    (out / "report.json").write_text("{}")
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
    assert [(branch, set(files)) for _, branch, files in hub.commits] == [
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
    listed = {line.split()[0] for line in result.stdout.splitlines() if line.endswith(" bytes")}
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
    assert "no place on the Hub" in result.stderr
    assert hub.repos == {}


def test_nothing_to_publish(tmp_path: Path, hub: FakeHub) -> None:
    assert "no quantized model" in push(tmp_path, "org/").stderr


@pytest.mark.parametrize("failure", [OSError("no network"), huggingface_hub.errors.HFValidationError("bad")])
def test_the_hub_refuses(output: Path, hub: FakeHub, failure: Exception) -> None:
    hub.failure = failure
    result = push(output, "org/")
    assert result.exit_code == 1
    assert "hf auth login" in result.stderr


def test_gguf_files(tmp_path: Path, hub: FakeHub) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed: pip install '.[gguf]'")
    folder = tmp_path / "files"
    folder.mkdir()
    for rate in ("4.5", "6.0"):
        writer = gguf.GGUFWriter(folder / f"L-{rate}bpw.gguf", "test")
        writer.add_tensor("a.weight", np.ones((2, 32), dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        (folder / f"L-{rate}bpw.README.md").write_text(CARD)
        (folder / f"L-{rate}bpw.report.json").write_text("{}")
    assert push(folder, "org/").exit_code == 0
    assert hub.repos == {"org/L-GGUF": True}
    assert [set(files) for _, _, files in hub.commits] == [
        {"README.md"},
        {"L-4.5bpw.gguf", "L-4.5bpw.README.md", "L-4.5bpw.report.json"},
        {"L-6.0bpw.gguf", "L-6.0bpw.README.md", "L-6.0bpw.report.json"},
    ]
    (folder / "L-6.0bpw.gguf").rename(folder / "odd.gguf")
    (folder / "L-6.0bpw.README.md").rename(folder / "odd.README.md")
    assert "tells no bitrate" in push(folder / "odd.gguf", "org/").stderr
    (folder / "odd.gguf.BROKEN.md").write_text("It is.")
    assert "marked as broken" in push(folder / "odd.gguf", "org/").stderr


def test_what_a_gguf_model_sees_images_with_goes_with_every_file(tmp_path: Path, hub: FakeHub) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed: pip install '.[gguf]'")
    folder = tmp_path / "all"
    folder.mkdir()
    # Runs on one model begin alike.
    runs = {"L-4.5bpw": "0123abcd4", "L-6.0bpw": "0123abcd6", "mmproj-L-BF16": "0123abcde"}
    for name, run in runs.items():
        writer = gguf.GGUFWriter(folder / f"{name}.gguf", "test")
        writer.add_string("bpwise.run", run)
        writer.add_tensor("w", np.ones((4, 32), dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        if name.startswith("L"):
            (folder / f"{name}.README.md").write_text("---\n---\n")
    assert push(folder, "org/").exit_code == 0
    assert [set(files) for _, _, files in hub.commits if len(files) > 1] == [
        {"L-4.5bpw.gguf", "L-4.5bpw.README.md", "mmproj-L-BF16.gguf"},
        {"L-6.0bpw.gguf", "L-6.0bpw.README.md", "mmproj-L-BF16.gguf"},
    ]
    assert {repo for repo, _, _ in hub.commits} == {"org/L-GGUF"}
