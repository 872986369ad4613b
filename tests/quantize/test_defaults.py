"""What a command that says little makes: default sizes, and names by convention in the current folder."""

import json
from pathlib import Path
from typing import Any

import pytest

from ..tiny_models import save_family
from .runs import TEXT, bpwise, succeed


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Any) -> Path:
    """A Llama, and ggml's library to plan it with."""
    pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")
    return save_family(tmp_path_factory.mktemp("models") / "llama", "llama", byte_tokenizer)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def said(*arguments: object) -> str:
    """Run a command; return what it says, with the name of the output first, and then its result."""
    result = bpwise(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stderr + result.stdout


def test_a_model_alone_is_enough(tiny_model: Path, tmp_path: Path) -> None:
    printed = said("quantize", tiny_model, *TEXT, "--no-eval")
    name = "tiny-8.0bpw-8hb-exl2"
    assert printed.splitlines()[0] == f"output      {name}"
    assert {path.name for path in tmp_path.iterdir()} == {name, f"{name}.work"}
    stored = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
    assert (stored["bits"], stored["head_bits"]) == (8.0, 8)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (("--bpw", 5), "tiny-5.0bpw-6hb-exl2"),
        (("--head-bits", 6), "tiny-8.0bpw-6hb-exl2"),
        (("--max-size", "150kB"), "tiny-0.15MB-6hb-exl2"),
        (("--vram", "8.5GB", "--context", 64), "tiny-8.5GB-vram-6hb-exl2"),
        (("--base-model", "org/Name"), "Name-8.0bpw-8hb-exl2"),
    ],
    ids=str,
)
def test_names_tell_the_size(tiny_model: Path, tmp_path: Path, options: tuple[object, ...], name: str) -> None:
    printed = said("quantize", tiny_model, *options, *TEXT, "--no-eval", "--dry-run")
    assert printed.splitlines()[0] == f"output      {name}"
    assert list(tmp_path.iterdir()) == []


def test_gguf(known: Path) -> None:
    # So small a model cannot have so few bits: what it is refused says what was asked for. Its rows are shorter than
    # blocks of 256 weights; mixtures up to IQ4_XS then consist of Q4_0 or IQ4_NL, and are of one size.
    result = bpwise("quantize", known, "--format", "gguf", "--no-eval", "--dry-run")
    assert result.stderr.splitlines()[0] == "output      llama-4.5bpw-IQ4_XS.gguf"
    assert "(4.5000 bits per weight) cannot be reached" in result.stderr


def test_a_mixture_names_its_file(known: Path) -> None:
    printed = said("quantize", known, "--type", "q4_k", "--no-eval", "--dry-run")
    assert printed.splitlines()[0] == "output      llama-Q4_K_M.gguf"


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (("out", "--format", "gguf", "--bpw", 9), "out.gguf"),
        (("out-1.5B", "--format", "gguf", "--bpw", 9), "out-1.5B.gguf"),
        (("out", "--type", "Q8_0"), "out.gguf"),
        (("out.GGUF", "--type", "Q8_0"), None),
    ],
    ids=str,
)
def test_the_ending_is_appended_where_it_lacks(known: Path, options: tuple[object, ...], name: str | None) -> None:
    printed = said("quantize", known, *options, "--no-eval", "--dry-run").splitlines()
    assert [line for line in printed if line.startswith("output")] == ([] if name is None else [f"output      {name}"])


def test_a_mixture_is_made_under_the_name_with_its_ending(converted: Any, tmp_path: Path) -> None:
    succeed("quantize", converted["qwen2"].directory, "out", "--type", "q8_0", "--no-eval")
    assert {path.name for path in tmp_path.iterdir()} == {"out.gguf", "out.gguf.work", "out.recipe.yaml"}


def test_both_formats_at_every_bitrate(known: Path, tmp_path: Path) -> None:
    printed = said("quantize", known, "out", "--format", "gguf,exl2", "--bpw", "6,5.5", "--no-eval", "--dry-run")
    sizes = [line.partition(" at ")[2] for line in printed.splitlines() if line.startswith("quantized")]
    assert sizes == ["6 bpw", "5.5 bpw", "6 bpw", "5.5 bpw"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "line"),
    [(("--size-of", "q8_0"), "output      llama-bpwise-Q8_0.gguf"), (("out", "--size-of", "Q8_0,Q5_1"), None)],
    ids=["one", "ladder"],
)
def test_as_large_as_a_file_of_llama_cpp(known: Path, options: tuple[object, ...], line: str | None) -> None:
    printed = said("quantize", known, *options, "--no-eval", "--dry-run").splitlines()
    sizes = [float(each.split()[1]) for each in printed if each.startswith("quantized")]
    ladder = [f"output        out/llama-bpwise-{name}.gguf" for name in ("Q8_0", "Q5_1")]
    assert [each for each in printed if each.startswith("output")] == (ladder if line is None else [line])
    assert len(sizes) == (2 if line is None else 1)
    assert sizes == sorted(sizes, reverse=True)
