"""For others: ``card``, ``push``, and the numbers that llama.cpp's users repeat, ``perplexity``."""

from __future__ import annotations

from pathlib import Path

import click

from .group import cli
from .options import OFFLOAD_OPTION
from .output import JSON_OPTION, note, progress_bar, say, say_json
from .types import EXISTING_DIRECTORY, EXISTING_PATH, FILE, MIB, MODEL

__all__ = ["card", "perplexity", "push"]


@cli.command()
@click.argument("model", type=EXISTING_PATH)
@click.option(
    "--original", help="Directory or Hub id of the original; its licence, language and card are carried over."
)
@click.option("--base-model", metavar="ORG/NAME", help="Hub id of the original.  [default: --original, if it is one]")
def card(model: Path, original: str | None, base_model: str | None) -> None:
    """Write the model card of MODEL.

    An EXL2 directory gets README.md; a GGUF file gets NAME.README.md beside it. The numbers come from the report that
    `bpwise quantize` or `bpwise eval` wrote.
    """
    from ..eval.publishing.cards import write_card

    if original is None:
        say("no --original given: licence, language and the original's card are not carried over", err=True)
    say(f"card -> {write_card(model, original=original, base_model=base_model)}")


@cli.command()
@click.argument("output", type=EXISTING_PATH)
@click.argument("target", metavar="ORG/[NAME]")
@click.option(
    "--branch",
    is_flag=True,
    help="Use one repository with a branch for each size, instead of one repository each.",
)
@click.option("--public", is_flag=True, help="Create public repositories, and allow uploads to existing public ones.")
@click.option("--dry-run", is_flag=True, help="Verify and list what would be uploaded; upload nothing.")
@JSON_OPTION
def push(output: Path, target: str, branch: bool, public: bool, dry_run: bool, as_json: bool) -> None:
    """Upload quantized models to the Hugging Face Hub, privately.

    OUTPUT is a quantized model or a folder of several. Without NAME, repositories get conventional names:
    ORG/Llama-3.2-1B-GGUF, ORG/Llama-3.2-1B-8.0bpw-8hb-exl2. Broken models, and models that fail verification, are
    refused.
    """
    from ..eval.publishing.push import find_outputs, plan_uploads, upload_model

    uploads = []
    for planned in plan_uploads(find_outputs(output), target, by_branch=branch):
        url = None if dry_run else upload_model(planned, public=public)
        uploads.append({**planned.to_dict(), "url": url})
        for line in planned.summary_lines() if dry_run else [f"{planned.output} -> {url}"]:
            say(line, err=as_json)
    if as_json:
        say_json("push", {"dry_run": dry_run, "uploads": uploads})


@cli.command()
@click.argument("model", type=MODEL)
@click.option(
    "-f",
    "--file",
    "text",
    help="Text to run on: a file, or a Hub data set of lines, as Salesforce/wikitext:wikitext-2-raw-v1:test.",
)
@click.option(
    "--kl-divergence-base",
    "base",
    type=FILE,
    help="File of the original's predictions: read with --kl-divergence, otherwise written. A chunk of 512 tokens "
    "takes 25 MB with a vocabulary of 49k, 133 MB with 262k.",
)
@click.option(
    "--kl-divergence", "compare", is_flag=True, help="Compare MODEL with the predictions in --kl-divergence-base."
)
@click.option(
    "-c", "--ctx-size", "window_tokens", type=click.IntRange(3), default=512, help="Tokens in each chunk of the text."
)
@click.option("--chunks", type=click.IntRange(1), help="Number of chunks, from the start of the text.  [default: all]")
@click.option(
    "--original", type=MODEL, help="Original of a GGUF file, for its tokenizer; not needed where MODEL is a directory."
)
@click.option(
    "--engine",
    type=click.Choice(["transformers", "llama.cpp"]),
    default="transformers",
    help="What runs the model; llama.cpp runs a GGUF file, on the CPU.",
)
@click.option(
    "--llama-cpp",
    type=EXISTING_DIRECTORY,
    help="Build of llama.cpp to run.  [default: the one in the package xllamacpp]",
)
@click.option("--device", default="auto", help="Where to compute: cpu, cuda, cuda:N, mps or auto.")
@OFFLOAD_OPTION
def perplexity(
    model: Path | str,
    text: str | None,
    base: Path | None,
    compare: bool,
    window_tokens: int,
    chunks: int | None,
    original: Path | str | None,
    engine: str,
    llama_cpp: Path | None,
    device: str,
    offload_dir: Path | None,
) -> None:
    """Do what llama.cpp's llama-perplexity does, with its options, its files and its table.

    MODEL is an original, an EXL2 directory or a GGUF file, or one of these on the Hub. Without --kl-divergence its
    perplexity is printed, and its predictions go to --kl-divergence-base if that is named. With it, MODEL is compared
    with the predictions of its original in --kl-divergence-base. llama-perplexity reads and writes the same files.
    """
    from ..convert.opening import locate_model
    from ..eval.llama_perplexity.base_file import base_file_bytes
    from ..eval.llama_perplexity.model import PerplexityModel
    from ..eval.llama_perplexity.run import compare_with_base, measure_perplexity, windows_for
    from ..eval.llama_perplexity.table import final_line, table_lines

    if compare and base is None:
        raise click.UsageError(
            "--kl-divergence needs --kl-divergence-base. Name the file of the original's predictions."
        )
    if not compare and text is None:
        raise click.UsageError("no text. Name a file or a data set with --file, or compare with --kl-divergence.")
    opened = PerplexityModel.open(
        locate_model(model),
        original=None if original is None else locate_model(original),
        in_engine=engine == "llama.cpp",
        llama_cpp=llama_cpp,
        device=device,
        offload_dir=offload_dir,
    )
    if compare:
        assert base is not None
        for line in table_lines(compare_with_base(opened, base, progress_bar)):
            say(line)
        return
    assert text is not None
    rows = windows_for(opened, text, window_tokens=window_tokens, most=chunks)
    note(rows.description)
    if base is not None:
        windows, window_tokens = rows.tokens.shape
        size = base_file_bytes(windows, window_tokens, opened.vocab_size)
        note(f"{base} will take {size / MIB:.1f} MiB")
    say(final_line(measure_perplexity(opened, rows, base, progress_bar)))
