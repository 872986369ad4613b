import pytest
from bpwise.eval.report.drawings.svg import distinct_names


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["llama-Q4_K_M.gguf", "llama-Q8_0.gguf"], ["Q4_K_M", "Q8_0"]),
        (["llama-4.0bpw-exl2", "llama-4.5bpw-exl2"], ["4.0bpw", "4.5bpw"]),
        (["m-4.5bpw-Q4_K_M.gguf", "m-4.4bpw-Q4_K_S.gguf"], ["4.5bpw-Q4_K_M", "4.4bpw-Q4_K_S"]),
        (["m-Q4_K_M.gguf", "m-Q4_K_S.gguf"], ["Q4_K_M", "Q4_K_S"]),
        (["llama", "llama-4bpw"], ["llama", "llama-4bpw"]),
        (["same", "same"], ["same", "same"]),
        (["alone.gguf"], ["alone.gguf"]),
    ],
)
def test_labels_are_what_names_differ_in(names: list[str], labels: list[str]) -> None:
    assert distinct_names(names) == labels
