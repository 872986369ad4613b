"""Build a calibration set for a model, and look at what is in it.

    python examples/build_calibration_set.py MODEL_DIR out.safetensors
    python examples/build_calibration_set.py MODEL_DIR out.safetensors --source my_texts/
    python examples/build_calibration_set.py MODEL_DIR out.safetensors --source chat.jsonl --chat-template

Without ``--source`` the built-in text is used, which is there on every machine, offline.
"""

from pathlib import Path

import click
from bpwise.checkpoint.files.schemas import read_json
from bpwise.errors import BpwiseError, CalibrationError, printable
from bpwise.measure.text.calibration import CalibrationConfig, build_calibration
from bpwise.measure.text.tokenizer import load_tokenizer

__all__ = ["main"]

_PREVIEW_CHARACTERS = 200


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("output", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--source", help="Text file, directory, or Hub data set NAME[:CONFIG][:SPLIT]; default: built in.")
@click.option("--column", help="Column of a data set that holds the text.")
@click.option("--chat-template", is_flag=True, help="Render chat turns with the model's chat template.")
@click.option("--rows", type=click.IntRange(min=1), default=32, show_default=True, help="Number of rows.")
@click.option("--row-tokens", type=click.IntRange(min=2), default=1024, show_default=True, help="Tokens per row.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Chooses the places.")
def main(
    model: Path,
    output: Path,
    source: str | None,
    column: str | None,
    chat_template: bool,
    rows: int,
    row_tokens: int,
    seed: int,
) -> None:
    """Build a calibration set for the MODEL directory, describe it, and save it to OUTPUT (.safetensors)."""
    try:
        config = CalibrationConfig(
            source=source,
            column=column,
            chat_template=chat_template,
            rows=rows,
            row_tokens=row_tokens,
            seed=seed,
        )
        tokenizer = load_tokenizer(model)
        calibration = build_calibration(tokenizer, config, vocab_size=_vocab_size(model))
        calibration.save(output)
    except BpwiseError as error:
        raise click.ClickException(str(error)) from error

    # Texts and their names come from outside: control characters in them must not reach the terminal.
    click.echo(printable(calibration.description))
    for kind, count in calibration.rows_per_kind.items():
        click.echo(f"{count:6d} rows  {printable(kind)}")
    click.echo(f"row 0, from {printable(calibration.origins[0])}:")
    click.echo(printable(tokenizer.decode(calibration.tokens[0])[:_PREVIEW_CHARACTERS]))
    click.echo(f"fingerprint {calibration.fingerprint} -> {output}")


def _vocab_size(model: Path) -> int:
    path = model / "config.json"
    config = read_json(path, CalibrationError)
    # Models that see and hear keep the language model's settings one level down.
    vocab_size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if not isinstance(vocab_size, int):
        raise CalibrationError(f"{path}: vocab_size is missing. Name the directory of a language model.")
    return vocab_size


if __name__ == "__main__":
    main()
