"""Names of models on the Hub, in the forms of llama.cpp, Ollama and the Hub's addresses."""

from pathlib import Path

import pytest
from bpwise.checkpoint.model.hub_name import HubName, with_revision
from bpwise.errors import CheckpointError, ConfigError


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", HubName("gpt2")),
        ("org/name", HubName("org/name")),
        ("org/name@4.0bpw", HubName("org/name", "4.0bpw")),
        ("org/name@refs/pr/1", HubName("org/name", "refs/pr/1")),
        ("org/name-GGUF:Q4_K_M", HubName("org/name-GGUF", None, "Q4_K_M")),
        ("hf.co/org/name-GGUF:q4_k_m", HubName("org/name-GGUF", None, "q4_k_m")),
        ("https://huggingface.co/org/name", HubName("org/name")),
        ("org/name-GGUF@v1:Q4_K_M", HubName("org/name-GGUF", "v1", "Q4_K_M")),
        ("org/name-GGUF/m.gguf", HubName("org/name-GGUF", None, None, "m.gguf")),
        (
            "org/name-GGUF@main/Q8/m-1.gguf",
            HubName("org/name-GGUF", "main", None, "Q8/m-1.gguf"),
        ),
    ],
)
def test_parse(name: str, expected: HubName) -> None:
    assert HubName.parse(name) == expected


@pytest.mark.parametrize(
    "name", ["", "./m", "../m", "/m", "~/m", "org/", "org/name@", "a b", "org/n/../x.gguf", "a/b/c"]
)
def test_anything_else(name: str) -> None:
    assert HubName.parse(name) is None


FILES = [
    "README.md",
    "L-Q4_K_M.gguf",
    "L-Q4_K_S.gguf",
    "L-UD-Q8_K_XL.gguf",
    "BF16/L-BF16-00001-of-00002.gguf",
    "BF16/L-BF16-00002-of-00002.gguf",
    "mmproj-L-BF16.gguf",
]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/L:Q4_K_M", ["L-Q4_K_M.gguf"]),
        ("org/L:q4_k_s", ["L-Q4_K_S.gguf"]),
        ("org/L:UD-Q8_K_XL", ["L-UD-Q8_K_XL.gguf"]),
        ("org/L:BF16", FILES[4:6]),
        ("org/L/L-Q4_K_M.gguf", ["L-Q4_K_M.gguf"]),
        ("org/L/BF16/L-BF16-00001-of-00002.gguf", FILES[4:6]),
    ],
)
def test_find(name: str, expected: list[str]) -> None:
    parsed = HubName.parse(name)
    assert parsed is not None
    assert parsed.find(FILES, (".gguf",)) == expected


@pytest.mark.parametrize(("name", "got"), [("org/L", "several"), ("org/L:Q4_K", "none"), ("org/L/x.gguf", "none")])
def test_find_refuses_what_is_not_one_file(name: str, got: str) -> None:
    parsed = HubName.parse(name)
    assert parsed is not None
    with pytest.raises(CheckpointError, match=rf"org/L: one file is needed. Got {got}.*L-Q4_K_M.gguf.*org/L:TAG"):
        parsed.find(FILES, (".gguf",))
    assert HubName("org/L").find(FILES[:2], (".gguf",)) == ["L-Q4_K_M.gguf"]


def test_with_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert with_revision("org/name", None) == "org/name"
    assert with_revision("org/name", "v1") == "org/name@v1"
    Path("here").mkdir()
    for model in ("here", "org/name@v2"):
        with pytest.raises(ConfigError, match="--revision: has no effect"):
            with_revision(model, "v1")
