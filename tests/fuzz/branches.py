"""Which branches of the modules that read were taken, by coverage.py."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import bpwise
import click

__all__ = ["measured_branches"]

NOT_READING = {
    "checkpoint/files/resume": ("ResumeStore.save", "locked_work", "discard_artifacts"),
    "checkpoint/source/checkpoint": ("Checkpoint.open",),
    "checkpoint/source/hub": ("resolve_model", "directory_name"),
    "checkpoint/source/vocabulary": ("warn_of_tokens_beyond",),
    "convert/exl2/file/config": (
        *("exl2_config", "dense_config", "_set_common_keys", "_add_rope_keys", "_add_vision_keys"),
        "_remove_vision_keys",
    ),
    "convert/exl2/file/linear": (
        *("QuantizedLinear._validate_shapes", "QuantizedLinear._validate_groups"),  # store.py has refused all of it
        *("effective_scale", "QuantizedLinear.group_of_input"),
    ),
    "convert/exl2/file/store": ("linear_tensors",),
    "convert/gguf/llama_cpp/imatrix": (
        "require_fitting",
        "write_imatrix",
        "_write_legacy",
        "ImportanceMatrix.from_means",
    ),
    "convert/gguf/plan/plan": ("TypeOverride.parse",),
    "convert/registry": ("format_asking", "__getattr__", "format_named"),
    "eval/cache": ("OriginalCache._prune",),
    "eval/metrics/overlap": ("shared_share", "refuse_calibration_text", "with_overlap_warning"),
    "eval/publishing/cards": ("check_base_model", "_base_name"),
    "eval/publishing/push": (
        *("Upload.pages", "Upload.summary_lines", "find_outputs", "plan_uploads", "_check", "_upload", "_front_pages"),
        *("_named", "_size", "_directory_files"),
    ),
    "measure/text/calibration": (
        *("build_calibration", "_open_source", "CalibrationConfig.__post_init__", "require_ids_below"),
    ),
    "measure/text/mixture": ("shares_of",),
    "measure/text/sources": (*("read_texts", "text_files", "_directory_source", "_quiet_progress_bars"),),
    "quantize/timing/finished": ("finished_measuring",),
}
"""Functions of modules that read which do not: they write, compute, look at options and names, or once more at what
was refused before."""

_ROOT = Path(bpwise.__file__).resolve().parent


@contextmanager
def measured_branches(modules: Mapping[str, Sequence[str]]) -> Iterator[None]:
    """Measure what happens inside, then print a line for each reader, and the lines whose branches were not taken.

    Args:
        modules: Of each reader, those whose branches count, as ``convert/registry``. Nothing is measured without any.
    """
    if not modules:
        yield
        return
    import coverage

    files = sorted({str(_ROOT / f"{module}.py") for each in modules.values() for module in each})
    with tempfile.TemporaryDirectory() as folder:
        settings = {"data_file": f"{folder}/data", "branch": True, "include": files, "config_file": False}
        measuring = coverage.Coverage(data_suffix=True, **settings)
        measuring.start()
        try:
            yield
        finally:
            measuring.stop()
            measuring.save()
        combined = coverage.Coverage(**settings)
        combined.combine([folder])
        combined.json_report(outfile=f"{folder}/report.json")
        report = json.loads(Path(f"{folder}/report.json").read_text())
    found = {}
    for path, file in report["files"].items():
        name = str(Path(path).resolve().relative_to(_ROOT))[:-3]
        found[name] = {key: each for key, each in file["functions"].items() if key not in NOT_READING.get(name, ())}
    for reader, names in modules.items():
        sums = [each["summary"] for name in names for each in found[name].values()]
        taken, all_ = (sum(each[key] for each in sums) for key in ("covered_branches", "num_branches"))
        click.echo(f"{reader:12}{taken:6} of {all_:4} branches, {taken / max(1, all_):.1%}")
    sums = [each["summary"] for functions in found.values() for each in functions.values()]
    taken, all_ = (sum(each[key] for each in sums) for key in ("covered_branches", "num_branches"))
    click.echo(f"{'all':12}{taken:6} of {all_:4} branches, {taken / max(1, all_):.1%}, each module once")
    for name, functions in sorted(found.items()):
        for function, each in functions.items():
            missing = ", ".join(f"{start}->{max(0, end)}" for start, end in each["missing_branches"])
            if missing:
                click.echo(f"{name} {function or '(module)'}: {missing}")
