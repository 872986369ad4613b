"""What a model card says of an EXL2 model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...checkpoint.equalized.view import EQUALIZED_NOTE
from ...checkpoint.model.families import is_known
from ...tables import bytes_text
from ..model import CardFacts
from ..names import RATE, convention_name, pasteable
from .file.config import stored_rates
from .file.manifest import Changes, Provenance
from .file.reader import Exl2Model
from .readers.limits import reader_warnings

__all__ = ["exl2_card", "exl2_name", "loading"]


def exl2_card(model: Exl2Model, base_name: str) -> CardFacts:
    """Return what a card says of a model; ``base_name`` is what the original is called."""
    bits, head_bits = stored_rates(model.stored_config)
    name = model.path.name
    if bits is not None and not RATE.search(name):
        name = exl2_name(base_name, bits, head_bits)
    return CardFacts(
        name=name,
        kind="an EXL2 model",
        library="exllamav2",
        made=_made(model),
        limits=reader_warnings(model.config) if is_known(model.config) else (),
        loading=loading(pasteable(name)),
    )


def exl2_name(base_name: str, bpw: float | str, head_bits: int | None) -> str:
    """Return the name by convention: ``Llama-3.2-1B-8.0bpw-8hb-exl2``.

    Args:
        base_name: Name of the original; of a Hub id the part after the owner is taken.
        bpw: Bits per weight that were asked for, or another label of the size.
        head_bits: Bits of the head; None leaves them out.
    """
    return convention_name(base_name, bpw, *([] if head_bits is None else [f"{head_bits}hb"]), "exl2")


def loading(name: str) -> str:
    """Return how to load a model, as Markdown; its name must be harmless in a shell."""
    return f"""**ExLlamaV2** 0.3.2

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

**TabbyAPI**, on its branch `exl2-checkpoint`: put the directory into `models/` and name it in `config.yml`:

```yaml
model:
  model_dir: models
  model_name: {name}
  backend: exllamav2
```

**Transformers**: decode it with bpwise into a plain float16 checkpoint first:

```sh
bpwise dequantize {name} {name}-dense
```

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}-dense", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}-dense")
```

**llama.cpp** does not read EXL2. `bpwise quantize ORIGINAL OUT.gguf --bpw 4.5` makes a GGUF file of the original; the
decoded checkpoint can be converted with `convert_hf_to_gguf.py` as well."""


def _made(model: Exl2Model) -> tuple[tuple[str, str], ...]:
    quantization = _mapping(model.stored_config.get("quantization_config"))
    provenance = Provenance() if model.manifest is None else model.manifest.provenance
    calibration = _mapping(quantization.get("calibration"))
    bits, head_bits = stored_rates(model.stored_config)
    decoder_bpw = bits if provenance.bpw is None else provenance.bpw
    rows: list[tuple[str, object]] = [
        ("format", "EXL2"),
        ("decoder", _with_unit(decoder_bpw, "bits per weight, all overheads counted")),
        ("left in float16", _with_unit(provenance.float16_linears or None, "linears of the decoder")),
        ("output head", _with_unit(head_bits, "bits")),
        ("size of the weights", bytes_text(model.file_bytes)),
        ("changed while reading", _changes(provenance.changes)),
        ("calibration", calibration.get("dataset")),
        ("calibration rows", _with_unit(calibration.get("rows"), f"of {calibration.get('length')} tokens")),
        ("predicted damage", _with_unit(provenance.predicted_damage_nats, "nats per token")),
        ("scales", "fitted to the original's predictions" if provenance.effort == "high" else None),
        ("made with", f"bpwise {provenance.bpwise or quantization.get('version')}"),
    ]
    return tuple((name, str(value)) for name, value in rows if value is not None)


def _changes(changes: Changes) -> str | None:
    merged = [f"merged with the adapter {adapter.name}" for adapter in changes.adapters]
    return "; ".join(merged + ([f"channels {EQUALIZED_NOTE}"] if changes.equalized is not None else [])) or None


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _with_unit(value: object, unit: str) -> str | None:
    if not isinstance(value, int | float):
        return None
    return f"{value if isinstance(value, int) else format(value, '.4g')} {unit}"
