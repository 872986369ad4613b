"""For others: ``card``, ``push``."""

from __future__ import annotations

from pathlib import Path

import click

from .group import cli
from .output import JSON_OPTION, say, say_json
from .types import EXISTING_PATH

__all__ = ["card", "push"]


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
