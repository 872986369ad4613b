"""Files and tables are those of llama-perplexity itself; make_golden.py tells how golden.json was made."""

import gzip
import hashlib
import json
import re
from pathlib import Path

import pytest
from bpwise.cli import cli
from click.testing import CliRunner, Result

from .conftest import Pair
from .models import WINDOW_TOKENS, save_attending_model

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text(encoding="utf-8"))
NUMBER = re.compile(r"-?\d+\.(\d+)")


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(cli, ["perplexity", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result


def within_one_unit(line: str, expected: str) -> bool:
    """Whether two printed lines are equal but for one unit in the last digit of each number."""
    ours, theirs = NUMBER.finditer(line), list(NUMBER.finditer(expected))
    near = (abs(float(a[0]) - float(b[0])) < 1.5 * 10 ** -len(b[1]) for a, b in zip(ours, theirs, strict=True))
    return NUMBER.sub("", line).split() == NUMBER.sub("", expected).split() and all(near)


@pytest.fixture(scope="module")
def base(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.kld"
    result = run(pair.original, "-f", pair.text, "-c", WINDOW_TOKENS, "--kl-divergence-base", path, "--device", "cpu")
    assert within_one_unit(result.stdout.strip(), GOLDEN["final"])
    assert f"{path} will take {GOLDEN['base_bytes'] / 2**20:.1f} MiB" in result.stderr
    return path


def test_base_file_is_its_own_byte_for_byte(base: Path) -> None:
    # So each reads what the other wrote. The text is tokenized the same, BOS and a token's name in it included.
    assert base.stat().st_size == GOLDEN["base_bytes"]
    assert hashlib.sha256(base.read_bytes()).hexdigest() == GOLDEN["base_sha256"]


def test_table_is_the_one_that_it_prints(pair: Pair, base: Path) -> None:
    lines = run(pair.quantized, "--kl-divergence-base", base, "--kl-divergence", "--device", "cpu").stdout.splitlines()
    for line, expected in zip(lines, GOLDEN["table"], strict=True):
        assert within_one_unit(line, expected), (line, expected)


def test_table_is_the_same_where_llama_cpp_runs_the_model(pair: Pair, base: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp as a library comes with it")
    packed = Path(__file__).with_name("quantized.gguf.gz").read_bytes()
    (tmp_path / "q.gguf").write_bytes(gzip.decompress(packed))
    arguments = (tmp_path / "q.gguf", "--original", pair.original, "--kl-divergence-base", base, "--kl-divergence")
    lines = run(*arguments, "--engine", "llama.cpp").stdout.splitlines()
    assert all(map(within_one_unit, lines, GOLDEN["table"]))
    assert lines == run(*arguments, "--device", "cpu").stdout.splitlines()  # read by bpwise


def test_models_that_attend_are_near(tmp_path: Path, pair: Pair) -> None:
    # Engines round attention otherwise: six digits are left. The difference of two perplexities has those of both.
    original = save_attending_model(tmp_path / "original")
    other = save_attending_model(tmp_path / "other", quantized=True)
    base = ("--kl-divergence-base", tmp_path / "base.kld", "--device", "cpu")
    lines = run(original, "-f", pair.text, "-c", WINDOW_TOKENS, *base).stdout.splitlines()
    lines += run(other, "--kl-divergence", *base).stdout.splitlines()
    for line, expected in zip(lines, [GOLDEN["attending"]["final"], *GOLDEN["attending"]["table"]], strict=True):
        numbers = [[float(found[0]) for found in NUMBER.finditer(each)] for each in (line, expected)]
        near = 1.1e-3 if "%" in line else 6e-3 if "PPL(Q)-PPL" in line else 1e-5
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-5, abs=near), (line, expected)


def test_a_unit_is_seen() -> None:
    # The tests above would pass if nothing were compared.
    assert within_one_unit("Mean KLD: 1.234567 ± 0.1", "Mean    KLD:   1.234568 ± 0.2")
    assert not within_one_unit("Mean KLD: 1.234567", "Mean KLD: 1.234569")
    assert not within_one_unit("Mean KLD: 1.0", "Mean PPL: 1.0")
