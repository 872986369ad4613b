"""What ExLlamaV2 makes of EXL2 directories, on a CPU: its logits beside those of Transformers.

    python benchmarks/exllamav2_reads.py --exllamav2 build/exl/exllamav2 DIRECTORY ...

ExLlamaV2's own Python reads config.json, looks for its tensors, loads and reorders them and runs the model on text; a
vision tower it only loads. ``exllamav2_standin.py`` takes the place of CUDA. Transformers runs the dense checkpoint
that bpwise decodes the directory to. Prints one line a model; the exit code is 1 if any logits are not the same.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import exllamav2_standin
import torch
from bpwise.checkpoint.model.names import text_config
from bpwise.convert.dense import dequantize_model
from bpwise.convert.exl2.file.reader import Exl2Model
from bpwise.errors import BpwiseError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils import logging

__all__ = ["LARGEST_ERROR", "Reading", "main", "read"]

LARGEST_ERROR = 2e-4
"""Mean square error of logits over their variance that rounding to float16 may make: it makes up to 4e-5, and a wrong
rope in one block of four 1.4e-3."""

_QWEN3 = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What came of one directory.

    Attributes:
        directory: The EXL2 directory.
        error: Mean square error of ExLlamaV2's logits over the variance of those of Transformers; infinite if it
            refused the model.
        said: Why it refused it, or what was set to have it compute the model that it means.
    """

    directory: Path
    error: float
    said: str = ""

    @property
    def same(self) -> bool:
        """Whether it computes the same model."""
        return self.error <= LARGEST_ERROR


def read(directories: Sequence[Path], package: Path, *, row_tokens: int = 32) -> Iterator[Reading]:
    """Have ExLlamaV2 run models.

    Puts stand-ins for CUDA in place, which stay in the process.

    Args:
        directories: EXL2 directories.
        package: The unpacked folder ``exllamav2``.
        row_tokens: Tokens of the row that they run on; fewer where blocks see less, as ExLlamaV2 needs flash-attn for
            sliding windows.

    Yields:
        One result a directory.

    Raises:
        BpwiseError: A directory is no EXL2 model.
    """
    rows = [_row(directory, row_tokens) for directory in directories]
    wanted = [_transformers_logits(directory, row) for directory, row in zip(directories, rows, strict=True)]
    with contextlib.redirect_stdout(io.StringIO()):  # it finds no CUDA, and says so
        exllamav2_standin.install(package.resolve().parent, seed=0)
    for directory, row, logits in zip(directories, rows, wanted, strict=True):
        try:
            got, said = _exllamav2_logits(directory, row)
        except Exception as error:  # whatever it trips over is the result
            yield Reading(directory=directory, error=float("inf"), said=f"{type(error).__name__}: {error}")
            continue
        got = got[..., : logits.shape[-1]]
        yield Reading(directory=directory, error=float((got - logits).square().mean() / logits.var()), said=said)


def _row(directory: Path, tokens: int) -> Tensor:
    config = text_config(Exl2Model.open(directory).config)
    window = config.get("sliding_window") or tokens
    drawn = torch.randint(0, config["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(0))
    return drawn[:, : window - 1]


def _transformers_logits(directory: Path, row: Tensor) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense"
        dequantize_model(directory, dense)
        kind = AutoModelForImageTextToText if "vision_config" in Exl2Model.open(directory).config else None
        model = (kind or AutoModelForCausalLM).from_pretrained(dense, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            logits: Tensor = model(input_ids=row).logits
    return logits


def _exllamav2_logits(directory: Path, row: Tensor) -> tuple[Tensor, str]:
    exllamav2: Any = importlib.import_module("exllamav2")
    printed, said = io.StringIO(), ""
    with exllamav2_standin.CpuForCuda(), contextlib.redirect_stdout(printed):
        config = exllamav2.ExLlamaV2Config()
        config.model_dir = str(directory)
        config.no_flash_attn = config.no_xformers = config.no_sdpa = config.no_graphs = True
        config.prepare()
        config.max_input_len = row.shape[1]
        config.max_attention_size = row.shape[1] ** 2
        if config.architecture in _QWEN3 and config.arch.lm.headnorm != "rmsnorm":
            # It would take them for layer norms, and be the only program to do so.
            config.arch.lm.headnorm, said = "rmsnorm", "with root-mean-square norms of heads"
        model = exllamav2.ExLlamaV2(config)
        model.set_device_map([1 << 20])
        for module in model.modules:
            module.load()
        logits: Tensor = model.forward_chunk(row)["logits"].float()
        if config.vision_model_type:
            tower: Any = importlib.import_module("exllamav2.vlm.vision_tower").ExLlamaV2VisionTower(config)
            for module in tower.modules:
                module.set_device_idx(0)
                module.load()
    unknown = [line.strip(" !") for line in printed.getvalue().splitlines() if "!!" in line]
    return logits, "; ".join([*unknown, said] if said else unknown)


@click.command(context_settings={"show_default": True})
@click.argument("directories", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--exllamav2",
    "package",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path("build/exl/exllamav2"),
    help="The unpacked folder 'exllamav2' of version 0.3.2.",
)
@click.option("--row-tokens", type=click.IntRange(2), default=32, help="Tokens that models run on.")
def main(directories: tuple[Path, ...], package: Path, row_tokens: int) -> None:
    """Run the EXL2 models in DIRECTORIES by ExLlamaV2 and by Transformers, and compare the logits."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    failed = False
    try:
        for result in read(directories, package, row_tokens=row_tokens):
            verdict = "same" if result.same else "OFF"
            note = f"  ({result.said})" if result.said else ""
            click.echo(f"{verdict:5} {result.error:8.1e}  {result.directory}{note}")
            failed = failed or not result.same
    except BpwiseError as error:
        raise click.ClickException(str(error)) from error
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
