r"""bpwise and its peers on the same model, tokens and core: processor time, size and KL divergence.

    python benchmarks/peers.py MODEL --exllamav2 build/exl/exllamav2 --gptqmodel GPTQ/bin/python \
        --auto-round ROUND/bin/python --llama-quantize build/llama.cpp/bin/llama-quantize

GPTQ and ROUND are virtual environments with GPTQModel and AutoRound (see ``peer_packages.py``); peers that are not
named are left out. Each quantizes MODEL with its own defaults at 4 bits, in processes of one thread whose user and
system time is taken, on the calibration tokens that bpwise takes; then bpwise does, to the same bits per weight. What
GGUF files start from, the model as it comes from llama.cpp's converter, and decoding for the comparison count for none.
Files and finished rows stay in the work directory, and a run that was cut off goes on; delete it after a change of the
code.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from bpwise.checkpoint.source.checkpoint import TensorSource
from bpwise.checkpoint.source.original import open_model
from bpwise.convert.exl2.file.reader import Exl2Model
from bpwise.convert.gguf.llama_cpp.converter import make_base
from bpwise.convert.gguf.llama_cpp.imatrix import write_imatrix
from bpwise.convert.gguf.model.reader import GgufModel
from bpwise.convert.opening import verify_model
from bpwise.errors import BpwiseError
from bpwise.eval.comparison import EvalConfig, compare_with, evaluation_rows
from bpwise.eval.models import vocab_size_of
from bpwise.eval.original import OriginalRun, run_original
from bpwise.measure.calibrated import calibration_rows
from bpwise.measure.text.calibration import CalibrationConfig
from bpwise.measure.text.tokenizer import load_tokenizer
from importance import input_mean_squares
from safetensors.torch import save_file

__all__ = ["Result", "main", "table"]

_HERE = Path(__file__).parent
_MIXTURE = "Q4_K_M"

# GPTQModel's pool of threads does not start with one worker, which is its default on one or two cores.
_ONE_THREAD = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    "GPTQMODEL_CPU_WORKERS": "2",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One quantized model.

    Attributes:
        name: What was run.
        once_seconds: Processor seconds of what serves all sizes, as a measurement; 0 if there is nothing of the kind.
        seconds: Processor seconds of all else.
        bpw: Bits per weight with scales, of the decoder's linears; of all tensors in a GGUF file.
        head_bpw: The output head's; None in a GGUF file.
        file_bytes: Size of the weights' files.
        kl_nats: Mean KL divergence from the original, nats per token.
        kl_error: Its standard error.
    """

    name: str
    once_seconds: float
    seconds: float
    bpw: float
    head_bpw: float | None
    file_bytes: int
    kl_nats: float
    kl_error: float


def table(results: Sequence[Result]) -> str:
    """Return the results as Markdown."""
    lines = [
        "| | once, CPU s | each size, CPU s | bits per weight | head | MB | KL |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        head = "" if result.head_bpw is None else f"{result.head_bpw:.2f}"
        once = f"{result.once_seconds:.0f}" if result.once_seconds else ""
        size = f"{result.file_bytes / 1e6:.1f}"
        kl = f"{result.kl_nats:.4f} ± {result.kl_error:.4f}"
        lines.append(f"| {result.name} | {once} | {result.seconds:.0f} | {result.bpw:.3f} | {head} | {size} | {kl} |")
    return "\n".join(lines)


def cpu_seconds(command: Sequence[str | Path], log: Path) -> float:
    """Run a command with one thread and return the user and system seconds of its processes."""
    before = os.times()
    with log.open("ab") as file:
        subprocess.run(list(map(str, command)), stdout=file, stderr=file, check=True, env={**os.environ, **_ONE_THREAD})
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


class _Benchmark:
    def __init__(self, model: str, work: Path, calibration: CalibrationConfig, evaluate: EvalConfig) -> None:
        self.checkpoint = open_model(model)
        self.work = work
        self.evaluate = evaluate
        self.log = work / "log.txt"
        self.rows = calibration_rows(self.checkpoint, calibration)
        self.tokens = work / "tokens.safetensors"
        save_file({"input_ids": self.rows.tokens.contiguous()}, self.tokens)
        self.original: OriginalRun | None = None
        shape = {"rows": calibration.rows, "row-tokens": calibration.row_tokens}
        self.calibrate = [str(part) for key, number in shape.items() for part in (f"--{key}", number)]
        path = work / "results.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        self.results = {one.name: one for one in (Result(**json.loads(line)) for line in lines)}

    def exllamav2(self, package: Path, bpw: float) -> None:
        name = f"ExLlamaV2 at {bpw:g} bpw"
        if name in self.results:
            return
        work, out = self.work / "exllamav2", self.work / "exllamav2-out"
        command = [sys.executable, _HERE / "exllamav2_peer.py", self.checkpoint.directory, out, *self.calibrate]
        command += ["--exllamav2", package, "--bpw", bpw, "--work-dir", work]
        total = self.timed(out, command)
        # It says how long its two stages took by the clock; processor seconds are divided alike.
        clock = {line.split()[0]: float(line.split()[1]) for line in self.log.read_text().splitlines()[-3:-1]}
        once = total * clock["measure"] / sum(clock.values())
        self.exl2_result(name, out, (once, total - once))

    def bpwise_exl2(self, bpw: float, head_bits: int) -> None:
        name = f"bpwise EXL2 at {bpw:.3f} bpw, head of {head_bits} bits"
        if name not in self.results:
            out = self.work / f"bpwise-{bpw:.3f}"
            options = ["--bpw", f"{bpw:.4f}", "--head-bits", head_bits]
            self.exl2_result(name, out, self.bpwise("exl2", out, options))

    def bpwise(self, kind: str, out: Path, options: Sequence[Any]) -> tuple[float, float]:
        measurement = self.work / f"{kind}.safetensors"
        program = [sys.executable, "-c", "from bpwise.cli import main; main()"]
        directory = self.checkpoint.directory
        measure = [*program, "measure", directory, "-o", measurement, "--formats", kind, *self.calibrate]
        once = self.kept(measurement, measure)
        command = [*program, "quantize", directory, out, "-m", measurement, "--no-eval", *options]
        return once, self.timed(out, command)

    def package(self, name: str, python: Path, title: str, options: Sequence[Any]) -> float:
        """Have a package quantize, and return its bits per weight."""
        key = f"{title}, groups of {options[1]}"
        if key not in self.results:
            out, plain = self.work / f"{name}-{options[1]}", self.work / "plain"
            script = [python, _HERE / "peer_packages.py", name]
            directory = self.checkpoint.directory
            seconds = self.kept(out, [*script, "quantize", directory, out, "--tokens", self.tokens, *options])
            self.timed(plain, [*script, "decode", out, plain, "--original", directory])
            bpw = json.loads((plain / "bits.json").read_text())["bpw"]
            self.judge(key, open_model(plain), (0, seconds), (bpw, 16), out)
        return self.results[key].bpw

    def gguf(self, program: Path) -> None:
        theirs = f"llama-quantize {_MIXTURE}, importance matrix"
        ours = "bpwise GGUF of that size"
        base, imatrix = self.work / "base.gguf", self.work / "imatrix.gguf"
        if not base.exists():
            make_base(self.checkpoint, base)
        if theirs not in self.results:
            before = os.times()
            write_imatrix(imatrix, input_mean_squares(self.checkpoint, self.rows.tokens))
            after = os.times()
            once = after.user + after.system - before.user - before.system
            out = self.work / "theirs.gguf"
            seconds = self.timed(out, [program, "--imatrix", imatrix, base, out, _MIXTURE, "1"])
            self.gguf_result(theirs, out, (once, seconds))
        if ours not in self.results:
            out = self.work / "ours.gguf"
            size = ["--max-size", self.results[theirs].file_bytes, "--base", base]
            self.gguf_result(ours, out, self.bpwise("gguf", out, size))

    def kept(self, out: Path, command: Sequence[Any]) -> float:
        """Run a command as ``timed`` does, unless that was done before."""
        note = out.with_name(f"{out.name}.seconds")
        if not note.exists():
            note.write_text(str(self.timed(out, command)))
        return float(note.read_text())

    def timed(self, out: Path, command: Sequence[Any]) -> float:
        """Run a command that makes ``out``, without what an earlier run has left of it."""
        for path in (out, out.with_name(f"{out.name}.work")):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        return cpu_seconds(command, self.log)

    def exl2_result(self, name: str, out: Path, seconds: tuple[float, float]) -> None:
        rates = verify_model(out).rates
        head = rates["head"] if math.isfinite(rates["head"]) else 16.0
        self.judge(name, Exl2Model.open(out), seconds, (rates["decoder"], head), out)

    def gguf_result(self, name: str, out: Path, seconds: tuple[float, float]) -> None:
        model = GgufModel.open(out)
        bits = 8 * sum(tensor.size_bytes for tensor in model.header.tensors.values())
        self.judge(name, model.beside(self.checkpoint), seconds, (bits / model.parameter_count, None), out)

    def judge(
        self,
        name: str,
        quantized: TensorSource,
        seconds: tuple[float, float],
        rates: tuple[float, float | None],
        out: Path,
    ) -> None:
        if self.original is None:
            tokenizer = load_tokenizer(self.checkpoint.directory)
            rows = evaluation_rows(tokenizer, self.evaluate, vocab_size=vocab_size_of(self.checkpoint))
            self.original = run_original(self.checkpoint, rows, self.evaluate)
        kl = compare_with(self.original, quantized).summary.kl_nats
        files = [out] if out.is_file() else list(out.glob("*.safetensors"))
        self.results[name] = Result(
            name=name,
            once_seconds=seconds[0],
            seconds=seconds[1],
            bpw=rates[0],
            head_bpw=rates[1],
            file_bytes=sum(file.stat().st_size for file in files),
            kl_nats=kl.value,
            kl_error=kl.standard_error or 0.0,
        )
        with (self.work / "results.jsonl").open("a") as file:
            file.write(json.dumps(asdict(self.results[name])) + "\n")
        click.echo(table([self.results[name]]).splitlines()[-1], err=True)


@click.command(context_settings={"show_default": True})
@click.argument("model")
@click.option("--exllamav2", type=click.Path(exists=True, path_type=Path), help="Its unpacked package.")
@click.option("--gptqmodel", type=click.Path(exists=True, path_type=Path), help="A Python that has it.")
@click.option("--auto-round", type=click.Path(exists=True, path_type=Path), help="A Python that has it.")
@click.option("--llama-quantize", type=click.Path(exists=True, path_type=Path), help="The program.")
@click.option("--group-size", default=64, help="Of GPTQModel and AutoRound.")
@click.option("--iterations", default=200, help="AutoRound's; 50 is its light recipe.")
@click.option("--rows", default=8, help="Calibration rows.")
@click.option("--row-tokens", default=512, help="Tokens in each.")
@click.option("--eval-rows", default=6, help="Held-out rows.")
@click.option("--eval-row-tokens", default=512, help="Tokens in each.")
@click.option("--work-dir", type=click.Path(path_type=Path), default=Path("build/peers"))
def main(model: str, work_dir: Path, **options: Any) -> None:
    """Compare bpwise with its peers on MODEL."""
    work_dir.mkdir(parents=True, exist_ok=True)
    try:
        calibration = CalibrationConfig(rows=options["rows"], row_tokens=options["row_tokens"])
        evaluate = EvalConfig(rows=options["eval_rows"], row_tokens=options["eval_row_tokens"])
        benchmark = _Benchmark(model, work_dir, calibration, evaluate)
        _run(benchmark, options)
    except (BpwiseError, subprocess.CalledProcessError) as error:
        raise click.ClickException(f"{error} See {work_dir / 'log.txt'}.") from error
    click.echo(table(list(benchmark.results.values())))
    click.echo(f"\nCalibrated on {benchmark.rows.description}.")


def _run(benchmark: _Benchmark, options: Mapping[str, Any]) -> None:
    group = ["--group-size", options["group_size"]]
    rates = []
    if options["llama_quantize"]:
        benchmark.gguf(options["llama_quantize"])
    if options["gptqmodel"]:
        rates.append(benchmark.package("gptqmodel", options["gptqmodel"], "GPTQModel, 4 bits", group))
    if options["auto_round"]:
        iterations = options["iterations"]
        title = f"AutoRound, 4 bits, {iterations} iterations"
        more = [*group, "--iterations", iterations]
        rates.append(benchmark.package("auto-round", options["auto_round"], title, more))
    for bpw in sorted({round(rate, 3) for rate in rates}):
        benchmark.bpwise_exl2(bpw, head_bits=16)
    if options["exllamav2"]:
        benchmark.exllamav2(options["exllamav2"], 4.0)
    benchmark.bpwise_exl2(4.0, head_bits=6)


if __name__ == "__main__":
    main()
