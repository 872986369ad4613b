"""The card of a quantized model, as the Hub shows it: what was done, what it cost, how to load it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from ...tables import Table, cell
from .base_card import BaseCard

__all__ = ["HUB_ID", "Card", "Format", "rate_text", "render_card"]

Format = Literal["exl2", "gguf"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
"""What the Hub takes for ``base_model``: an owner and a name."""

_LIBRARIES: dict[Format, str] = {"exl2": "exllamav2", "gguf": "gguf"}

# They name the original's files, not ours.
_FORMAT_TAGS = frozenset({"safetensors", "pytorch", "gguf", "exl2", "exl3", "gptq", "awq", "onnx", "mlx", "jax", "tf"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """All that a card says.

    Attributes:
        name: Name of the quantized model, by convention as ``Llama-3.2-1B-8.0bpw-8hb-exl2``.
        format: Its format.
        base_name: Name of the original.
        base_model: Hub id of the original, or None if it is not known.
        file_name: Of a GGUF file its name; else empty.
        made: What was done: names and values.
        measured: The table of what it cost: a name, the original's value, the quantized model's; empty if it was not
            measured.
        measured_note: How that was measured.
        limits: What programs that load it compute otherwise than it was measured, as sentences.
        base: What the original's card says.
    """

    name: str
    format: Format
    base_name: str
    base_model: str | None = None
    file_name: str = ""
    made: tuple[tuple[str, str], ...]
    measured: tuple[tuple[str, str, str], ...] = ()
    measured_note: str = ""
    limits: tuple[str, ...] = ()
    base: BaseCard


def rate_text(bpw: float) -> str:
    """Return bits per weight as names have them: at least one decimal."""
    return f"{bpw:.1f}" if round(bpw, 1) == bpw else f"{bpw:g}"


def render_card(card: Card) -> str:
    """Return the card as Markdown with YAML front matter."""
    front = yaml.safe_dump(_front_matter(card), sort_keys=False, allow_unicode=True, width=1000)
    base = f"[{card.base_model}](https://huggingface.co/{card.base_model})" if card.base_model else cell(card.base_name)
    kind = "an EXL2 model" if card.format == "exl2" else "a GGUF file"
    sections = [
        f"# {cell(card.name)}",
        f"{base}, quantized to {kind} with bpwise.",
        *(f"> **Note.** {cell(note)}" for note in card.base.notes),
        "## What was done",
        Table.of_facts(card.made).to_markdown(),
        "## What it cost",
        *_measured(card),
        *_limits(card),
        "## How to load it",
        _loading_exl2(card) if card.format == "exl2" else _loading_gguf(card),
    ]
    if card.base.body:
        sections += ["---", f"# The card of the original, {cell(card.base_name)}", card.base.body]
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


def _front_matter(card: Card) -> dict[str, Any]:
    carried = [tag for tag in card.base.lists.get("tags", ()) if tag.lower() not in _FORMAT_TAGS]
    languages = list(card.base.lists.get("language", ()))
    entries: dict[str, Any] = {}
    if card.base_model is not None:
        entries |= {"base_model": card.base_model, "base_model_relation": "quantized"}
    entries |= {"library_name": _LIBRARIES[card.format], **card.base.values}
    entries.setdefault("pipeline_tag", "text-generation")
    if languages:
        entries["language"] = languages
    ours = [card.format, "quantized", "bpwise"]
    entries["tags"] = [*ours, *(tag for tag in carried if tag not in ours)]
    entries["model_name"] = card.name
    return entries


def _measured(card: Card) -> list[str]:
    if not card.measured:
        return ["Not measured: this model was not compared with the original."]
    return [Table.of(("", "original", "this model"), card.measured).to_markdown(), cell(card.measured_note)]


def _limits(card: Card) -> list[str]:
    return ["## Limits", "\n".join(f"- {cell(limit)}" for limit in card.limits)] if card.limits else []


def _loading_exl2(card: Card) -> str:
    name = _plain(card.name)
    return f"""**ExLlamaV2**

```python
from exllamav2 import ExLlamaV2, ExLlamaV2Cache, ExLlamaV2Config, ExLlamaV2Tokenizer
from exllamav2.generator import ExLlamaV2DynamicGenerator

config = ExLlamaV2Config("{name}")
model = ExLlamaV2(config)
cache = ExLlamaV2Cache(model, lazy=True)
model.load_autosplit(cache)
generator = ExLlamaV2DynamicGenerator(model=model, cache=cache, tokenizer=ExLlamaV2Tokenizer(config))
print(generator.generate(prompt="Once upon a time", max_new_tokens=100))
```

**TabbyAPI**: put the directory into `models/` and name it in `config.yml`:

```yaml
model:
  model_dir: models
  model_name: {name}
  backend: exllamav2
```

**Transformers**: decode it into a plain float16 checkpoint first (`pip install bpwise`):

```sh
bpwise dequantize {name} {name}-dense
```

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}-dense", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}-dense")
```

**llama.cpp** does not read EXL2. `bpwise quantize ORIGINAL OUT.gguf --bpw BITS` makes a GGUF file of the original; the
decoded checkpoint can be converted with `convert_hf_to_gguf.py` as well."""


def _loading_gguf(card: Card) -> str:
    file = _plain(card.file_name)
    return f"""**llama.cpp**

```sh
llama-cli --model {file} --prompt "Once upon a time"
llama-server --model {file}
```

**Transformers**: decode it into a plain float16 checkpoint first (`pip install bpwise`); ORIGINAL is the original's
directory, which has the tokenizer:

```sh
bpwise dequantize {file} dense --original ORIGINAL
```

**ExLlamaV2** and **TabbyAPI** do not read GGUF. `bpwise quantize ORIGINAL OUT --bpw BITS` makes an EXL2 model of the
original."""


def _plain(name: str) -> str:
    # It stands in code that people paste into a shell.
    return re.sub(r"[^\w./-]+", "-", name, flags=re.ASCII).lstrip("-") or "model"
