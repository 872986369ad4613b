"""Compare quantized models with their original on held-out text, and print a Markdown table.

    python examples/evaluate.py ORIGINAL QUANTIZED
    python examples/evaluate.py ORIGINAL QUANTIZED_4BIT QUANTIZED_8BIT --rows 64 --text my_texts/
    python examples/evaluate.py ORIGINAL QUANTIZED --report reports/

Models are directories (EXL2 or unquantized safetensors), GGUF files or Hugging Face Hub ids. All are streamed block by
block, so they need not fit into memory, and the original runs only once.
"""

from pathlib import Path

import click
from bpwise.errors import BpwiseError
from bpwise.eval.comparison import EvalConfig, evaluate_each
from bpwise.eval.report.content import Report
from bpwise.eval.report.report import write_report
from bpwise.eval.report.tables import models_table

__all__ = ["main"]


@click.command()
@click.argument("original")
@click.argument("quantized", nargs=-1, required=True)
@click.option("--text", help="Text file, directory, or Hub data set NAME[:CONFIG][:SPLIT]; default: built in.")
@click.option("--column", help="Column of a data set that holds the text.")
@click.option("--rows", type=click.IntRange(min=1), default=16, show_default=True, help="Number of rows.")
@click.option(
    "--row-tokens", type=click.IntRange(min=2), help="Tokens per row.  [default: 1024, or the model's context]"
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Chooses the places.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="What all models run in.",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:N, mps or auto.")
@click.option(
    "--report",
    type=click.Path(file_okay=False, path_type=Path),
    help="Also write reports into this directory: report.html and others on all models together, with the plots as SVG "
    "files, and on each model in a directory 1, 2, ...",
)
def main(
    original: str,
    quantized: tuple[str, ...],
    text: str | None,
    column: str | None,
    rows: int,
    row_tokens: int | None,
    seed: int,
    dtype: str,
    device: str,
    report: Path | None,
) -> None:
    """Compare each QUANTIZED model with the ORIGINAL."""
    try:
        config = EvalConfig(
            text=text, column=column, rows=rows, row_tokens=row_tokens, seed=seed, dtype=dtype, device=device
        )
        comparisons = []
        for number, comparison in enumerate(evaluate_each(original, quantized, config), start=1):
            comparisons.append(comparison)
            if report is not None:
                write_report(Report(comparisons=(comparison,)), report / str(number))
        if report is not None:
            write_report(Report(comparisons=tuple(comparisons)), report, plots=["svg"])
    except BpwiseError as error:
        raise click.ClickException(str(error)) from error

    click.echo(models_table(comparisons).to_markdown())
    click.echo(f"\n{comparisons[0].text}; floor {comparisons[0].floor_nats:.2g} nats per token.")


if __name__ == "__main__":
    main()
