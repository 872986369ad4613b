"""What a model card says of a GGUF file."""

from __future__ import annotations

import math
from collections import Counter

from ...checkpoint.equalized.view import EQUALIZED_NOTE
from ...tables import bytes_text
from ..model import CardFacts
from ..names import REPO, pasteable
from .file.describe import all_tensors_bpw
from .file.metadata import CALIBRATION_KEY, EFFORT_KEY, EQUALIZED_KEY, LIMITS_KEY, VERSION_KEY
from .file.split import whole_name
from .llama_cpp.mixtures import label_in
from .model.reader import GgufModel

__all__ = ["gguf_card", "loading"]

_CHAT = (
    "curl http://localhost:8080/v1/chat/completions -H 'Content-Type: application/json' \\\n"
    """  -d '{"messages": [{"role": "user", "content": "Why is the sky blue?"}]}'"""
)
"""The server renders the template that the file holds."""

_SHOWN_NAMES = 3
"""Names of tensors in one line."""


def gguf_card(model: GgufModel) -> CardFacts:
    """Return what a card says of a file."""
    return CardFacts(
        name=model.path.stem,
        kind="a GGUF file",
        library="gguf",
        made=_made(model),
        limits=tuple(str(model.header.metadata.get(LIMITS_KEY, "")).splitlines()),
        loading=loading(
            pasteable(model.path.name),
            label=_label(model),
            chat=model.chat_template() is not None,
        ),
    )


def loading(file: str, *, label: str | None = None, chat: bool = False) -> str:
    """Return how to load a file, as Markdown.

    Args:
        file: Its name, harmless in a shell.
        label: The mixture in its name, by which programs find it on the Hub; None if there is none.
        chat: Whether it is a chat model.
    """
    stem = whole_name(file.removesuffix(".gguf"))
    files = file if file.startswith(f"{stem}.") else f"{stem}-*.gguf"
    tag = label or file
    named = f"-hf {REPO}:{label}" if label else f"-hf {REPO} -hff {file}"
    asked = _CHAT if chat else f'llama-cli {named} --prompt "Once upon a time"'
    return f"""**Ollama**

```sh
ollama run hf.co/{REPO}:{tag}
```

**llama.cpp**

```sh
llama-server {named}
{asked}
```

**LM Studio**

```sh
lms get https://huggingface.co/{REPO}
```

**Download**, and run what is there:

```sh
hf download {REPO} --include "{files}" --local-dir .
llama-cli --model {file} --prompt "Once upon a time"
llama-server --model {file}
```

**Transformers**: decode it with bpwise into a plain float16 checkpoint first. ORIGINAL is the original's directory,
which has the tokenizer:

```sh
bpwise dequantize {file} dense --original ORIGINAL
```

**ExLlamaV2** and **TabbyAPI** do not read GGUF. `bpwise quantize ORIGINAL OUT --bpw 4.5` makes an EXL2 model of the
original."""


def _label(model: GgufModel) -> str | None:
    found = label_in(whole_name(model.path.stem))
    return None if found is None else found[1]


def _made(model: GgufModel) -> tuple[tuple[str, str], ...]:
    tensors, metadata = model.header.tensors.values(), model.header.metadata
    weights = Counter[str]()
    for tensor in tensors:
        weights[tensor.type.name] += math.prod(tensor.shape)
    # Numbers and arrays, which a file may have there too, say nothing.
    version, calibration = (
        value if isinstance(value, str) else None for value in map(metadata.get, (VERSION_KEY, CALIBRATION_KEY))
    )
    rows: list[tuple[str, object]] = [
        ("format", "GGUF"),
        ("bits per weight", f"{all_tensors_bpw(tensors):.4f}, over all tensors"),
        ("types", ", ".join(f"{name} {count / weights.total():.1%}" for name, count in weights.most_common())),
        ("rounded without a measurement", _unmeasured(model)),
        ("size of the file", bytes_text(model.file_bytes)),
        ("calibration", calibration),
        ("channels", EQUALIZED_NOTE if EQUALIZED_KEY in metadata else None),
        ("scales", "fitted to the original's predictions" if metadata.get(EFFORT_KEY) == "high" else None),
        ("made with", f"bpwise {version}" if version else "bpwise, as llama-quantize does"),
    ]
    return tuple((name, str(value)) for name, value in rows if value is not None)


def _unmeasured(model: GgufModel) -> str | None:
    # Matrices that are none of the original's linears, as the file says itself.
    unexplained = {} if model.own_map is None else model.own_map.unexplained
    tensors = model.header.tensors
    names = [name for name in unexplained if name in tensors and tensors[name].type.quantized]
    if not names:
        return None
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return f"{', '.join(names[:_SHOWN_NAMES])}{more}"
