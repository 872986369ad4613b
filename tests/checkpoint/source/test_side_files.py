"""Which files belong to a model: one list, whatever moves the model."""

import itertools
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from bpwise.checkpoint.carry.carried import copy_side_files
from bpwise.checkpoint.files.side_files import DOWNLOADED, NOT_DOWNLOADED, is_side_file
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.checkpoint.source.hub import require_own_files, side_files
from bpwise.errors import CheckpointError
from bpwise.measure.text.tokenizer import load_tokenizer
from huggingface_hub.utils import filter_repo_objects

# Listings of repositories on the Hub, shortened; with a + what belongs to the model beside config and weights.
LISTINGS = {
    "meta-llama/Llama-3.2-1B-Instruct": """
        .gitattributes + LICENSE.txt
        README.md + USE_POLICY.md
        config.json + generation_config.json
        model.safetensors
        original/consolidated.00.pth
        original/params.json
        original/tokenizer.model
        + special_tokens_map.json + tokenizer.json + tokenizer_config.json""",
    "mistralai/Mistral-Small-3.2-24B-Instruct-2506": """
        .gitattributes + SYSTEM_PROMPT.txt
        README.md + chat_template.jinja
        config.json
        consolidated.safetensors
        + generation_config.json
        model-00001-of-00010.safetensors model.safetensors.index.json
        params.json + preprocessor_config.json + processor_config.json + tekken.json + tokenizer.json
        + special_tokens_map.json + tokenizer_config.json + tokenizer.model.v3""",
    "openai/gpt-oss-20b": """
        + LICENSE README.md + USAGE_POLICY + chat_template.jinja config.json + generation_config.json
        metal/model.bin model-00000-of-00002.safetensors model.safetensors.index.json
        original/config.json original/dtypes.json original/model.safetensors
        + special_tokens_map.json + tokenizer.json + tokenizer_config.json""",
    "CohereLabs/c4ai-command-r7b-12-2024": """
        README.md + additional_chat_templates/rag.jinja + additional_chat_templates/tool_use.jinja
        + chat_template.jinja config.json + generation_config.json model-00001-of-00004.safetensors
        model.safetensors.index.json + special_tokens_map.json + tokenizer.json + tokenizer_config.json""",
    "Qwen/Qwen2.5-VL-3B-Instruct": """
        + LICENSE README.md + chat_template.json config.json + generation_config.json + merges.txt
        model-00001-of-00002.safetensors model.safetensors.index.json + preprocessor_config.json
        + tokenizer.json + tokenizer_config.json + video_preprocessor_config.json + vocab.json""",
    "tencent/Hunyuan-7B-Instruct": """
        + License.txt + Notice.txt README.md config.json configuration_hunyuan.py + generation_config.json
        hy.tiktoken.py + hy.tiktoken model-00001-of-00004.safetensors model.safetensors.index.json tokenization_hy.py
        + special_tokens_map.json + tokenizer_config.json assets/logo.png train/llama_factory_support/README.md""",
    "google/gemma-3-4b-it": """
        README.md + added_tokens.json + chat_template.json + chat_template.jinja config.json + generation_config.json
        model-00001-of-00002.safetensors model.safetensors.index.json + preprocessor_config.json
        + processor_config.json + special_tokens_map.json + tokenizer.json + tokenizer.model + tokenizer_config.json
        gemma-3-4b-it.gguf optimizer.pt pytorch_model.bin rng_state_0.pth trainer_state.json training_args.bin""",
}


def marked(listing: str) -> tuple[set[str], set[str]]:
    """All names of a listing, and those that are marked."""
    words = listing.split()
    return set(words) - {"+"}, {word for before, word in itertools.pairwise(words) if before == "+"}


def make(directory: Path, *names: str) -> Path:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(f"{name}'s content")
    return directory


@pytest.mark.parametrize("listing", LISTINGS.values(), ids=LISTINGS.keys())
def test_repositories(listing: str, tmp_path: Path) -> None:
    names, wanted = marked(listing)
    assert {name for name in names if is_side_file(name)} == wanted
    make(tmp_path / "m", *names)
    (tmp_path / "out").mkdir()
    (tmp_path / "m" / "processor_config.json").unlink(missing_ok=True)  # is read, and here no JSON
    copy_side_files(tmp_path / "m", tmp_path / "out")
    copied = {path.relative_to(tmp_path / "out").as_posix() for path in tmp_path.glob("out/**/*") if path.is_file()}
    assert copied == wanted - {"processor_config.json"}
    for name in copied:
        assert (tmp_path / "out" / name).read_text() == f"{name}'s content"


@pytest.mark.parametrize("listing", LISTINGS.values(), ids=LISTINGS.keys())
def test_downloads(listing: str) -> None:
    names, wanted = marked(listing)
    weights = {name for name in names if name.startswith("model") and "safetensors" in name}
    got = set(filter_repo_objects(names, allow_patterns=list(DOWNLOADED), ignore_patterns=list(NOT_DOWNLOADED)))
    # Small files of folders may come along: patterns of the Hub's client do not stop at a slash.
    got -= {name for name in names if "/" in name and name.endswith((".md", ".json", "tokenizer.model"))}
    assert got == wanted | weights | {"README.md", "config.json"}


@pytest.mark.parametrize(
    "name",
    [
        "license_head.safetensors",
        "LICENSE.bin",
        "NOTICE.gguf",
        "notice.py",
        ".license",
        "NOTICE/x.txt",
        "additional_chat_templates/x.py",
        "additional_chat_templates/.x.jinja",
        "additional_chat_templates/a/b.jinja",
        "other/chat_template.jinja",
        "params.json",
        "model.safetensors.index.json",
        "adapter_config.json",
        "word2vec.model",
        ".git/config",
    ],
)
def test_what_is_none(name: str) -> None:
    assert not is_side_file(name)


@pytest.mark.parametrize(
    "name", ["LICENSE-2.0", "LICENSE-MODEL", "License.pdf", "third_party_notices.html", "eula.RTF"]
)
def test_legal_texts(name: str) -> None:
    assert is_side_file(name)


def as_link_outside(path: Path) -> None:
    path.symlink_to(__file__)


def as_loop(path: Path) -> None:
    path.symlink_to(path.name)


def as_link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


def as_pointer(path: Path) -> None:
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * '0'}\nsize 17082730\n")


def as_socket(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # the path of a socket may have some hundred characters
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(path.name)
    finally:
        os.chdir(before)


BAD = {
    as_link_outside: "leads outside the model directory",
    as_loop: "cannot be followed|missing",
    as_link_to_nothing: "missing, or not a regular file",
    as_pointer: r"a Git LFS pointer, not the file itself\. Run `git lfs pull`",
    as_socket: "not a regular file",
    os.mkfifo: "not a regular file",
}


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "chat_template.jinja", "additional_chat_templates/x.jinja", "LICENSE", "generation_config.json"],
)
@pytest.mark.parametrize(("spoil", "message"), BAD.items(), ids=[kind.__name__ for kind in BAD])
def test_the_one_door(
    spoil: Callable[[Path], None], message: str, name: str, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = make_model("m")
    (model / "additional_chat_templates").mkdir()
    Checkpoint.open(model)
    (model / name).unlink(missing_ok=True)
    spoil(model / name)
    (tmp_path / "out").mkdir()
    for enter in (side_files, require_own_files, Checkpoint.open, load_tokenizer):
        with pytest.raises(CheckpointError, match=message) as caught:
            enter(model)
        assert str(caught.value).startswith(str(model / name))
    with pytest.raises(CheckpointError, match=message):
        copy_side_files(model, tmp_path / "out")


@pytest.mark.parametrize("name", ["README.md", "other.model", "config.json"])
def test_what_libraries_read_beside(name: str, make_model: Callable[..., Path]) -> None:
    model = make_model("m")
    (model / name).unlink(missing_ok=True)
    as_link_outside(model / name)
    for enter in (require_own_files, Checkpoint.open, load_tokenizer):
        with pytest.raises(CheckpointError, match="leads outside"):
            enter(model)


def test_a_linked_folder_of_templates(make_model: Callable[..., Path], tmp_path: Path) -> None:
    make(tmp_path / "elsewhere", "x.jinja")
    model = make_model("m")
    (model / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="leads outside"):
        load_tokenizer(model)


def test_tokenizer_files_that_a_config_names(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = make_model("m")
    make(tmp_path, "tokenizer.4.0.0.json")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    # Transformers joins the name of the newest version that it is to the directory's.
    settings["fast_tokenizer_files"] = ["tokenizer.99.0.0.json", "../tokenizer.4.0.0.json"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="unsafe file name"):
        load_tokenizer(model)
    settings["fast_tokenizer_files"] = ["tokenizer.99.0.0.json"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    load_tokenizer(model)


def test_folders_and_unrelated_files_do_not_matter(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = make_model("m")
    make(model, "LICENSE/MIT.txt", "images/logo.png")
    (model / "notes").symlink_to(tmp_path)
    (model / "plot.png").symlink_to(tmp_path / "nothing")
    os.mkfifo(model / "pipe")
    load_tokenizer(model)
    assert Checkpoint.open(model).names


def test_the_layout_of_the_hub_cache(make_model: Callable[..., Path], tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0", tmp_path / "models--a--b" / "blobs"
    snapshot.parent.mkdir(parents=True)
    blobs.mkdir()
    make(make_model("m"), "additional_chat_templates/x.jinja").rename(snapshot)
    for number, path in enumerate([path for path in snapshot.rglob("*") if path.is_file()]):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    assert "additional_chat_templates/x.jinja" in side_files(snapshot)
    assert len(load_tokenizer(snapshot)) == 258
    assert Checkpoint.open(snapshot).fingerprint


@pytest.mark.parametrize("name", ["tokenizer.json", "additional_chat_templates", "model.safetensors"])
def test_unreadable(name: str, make_model: Callable[..., Path]) -> None:
    model = make(make_model("m"), "additional_chat_templates/x.jinja")
    (model / name).chmod(0)
    try:
        if os.access(model / name, os.R_OK):
            pytest.skip("this user may read everything")
        with pytest.raises(CheckpointError, match=r"cannot be read|cannot be listed"):
            Checkpoint.open(model)
    finally:
        (model / name).chmod(0o700)
