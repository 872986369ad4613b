"""What a model card says of an MLX model."""

from __future__ import annotations

from collections import Counter

from ...checkpoint.equalized.view import EQUALIZED, EQUALIZED_NOTE
from ...tables import bytes_text
from ..model import CardFacts
from ..names import RATE, convention_name, pasteable
from .file.manifest import Provenance
from .file.model import MlxModel

__all__ = ["loading", "mlx_card", "mlx_name"]


def mlx_card(model: MlxModel, base_name: str) -> CardFacts:
    """Return what a card says of a model; ``base_name`` is what the original is called."""
    provenance = Provenance() if model.manifest is None else model.manifest.provenance
    name = model.path.name
    weights = Counter[str]()
    for each, tensor in model.layout.tensors.items():
        weights[model.schemes[each].name if each in model.schemes else "not quantized"] += tensor.weights
    total = max(1, weights.total())
    bits = sum(model.stored.info(each).size_bytes for each in model.stored.names) * 8 / total
    if not RATE.search(name):
        name = mlx_name(base_name, round(bits, 2))
    rows: list[tuple[str, str | None]] = [
        ("format", "MLX"),
        ("bits per weight", f"{bits:.4f}, over all tensors"),
        ("bits and groups", ", ".join(f"{own} {n / total:.1%}" for own, n in weights.most_common())),
        ("size of the weights", bytes_text(model.file_bytes)),
        ("calibration", provenance.calibration or None),
        ("predicted damage", _nats(provenance.predicted_damage_nats)),
        ("channels", EQUALIZED_NOTE if EQUALIZED in provenance.changes else None),
        ("made with", f"bpwise {provenance.bpwise}" if provenance.bpwise else None),
    ]
    return CardFacts(
        name=name,
        kind="an MLX model",
        library="mlx",
        made=tuple((what, value) for what, value in rows if value is not None),
        limits=provenance.warnings,
        loading=loading(pasteable(name), chat=model.chat_template() is not None),
    )


def mlx_name(base_name: str, bpw: float | str) -> str:
    """Return the name by convention: ``Llama-3.2-1B-4.5bpw-mlx``."""
    return convention_name(base_name, bpw, "mlx")


def loading(name: str, *, chat: bool = False) -> str:
    """Return how to load a model, as Markdown; its name must be harmless in a shell.

    Args:
        name: Of the model's directory.
        chat: Whether it is a chat model.
    """
    talk = f"mlx_lm.chat --model {name}\n" if chat else ""
    return f"""**mlx-lm**, on a Mac with Apple silicon:

```sh
pip install mlx-lm
{talk}mlx_lm.generate --model {name} --prompt "Why is the sky blue?"
mlx_lm.server --model {name}
```

**LM Studio** loads the directory from its folder of models.

**Transformers**: decode it with bpwise into a plain float16 checkpoint first:

```sh
bpwise dequantize {name} {name}-dense
```"""


def _nats(damage: float | None) -> str | None:
    return None if damage is None else f"{damage:.4g} nats per token"
