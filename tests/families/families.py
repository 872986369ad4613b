"""The families that GGUF output is tried on: data, one entry for every ``configs/NAME.json``."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FAMILIES", "Family"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What to tell of a family, and how it is tried.

    Attributes:
        releases: Models of it, as their makers call them.
        special: What is special about it, for the documentation.
        source: Hub id of the model whose config.json was shrunk; empty where the file was written with the keys of such
            models, from Transformers' class and what llama.cpp's converter reads.
        known_miss: Why llama.cpp computes another model than Transformers, where it does; empty elsewhere.
        mtp: Whether models of it come with layers for multi-token prediction that llama.cpp's converter takes over.
        tried: Whether there is a tiny model of it.
    """

    releases: str
    special: str
    source: str = ""
    known_miss: str = ""
    mtp: bool = False
    tried: bool = True


FAMILIES = {
    "apertus": Family(
        releases="Apertus", special="xIELU with trained constants, no gate in the MLP; norms of queries and keys"
    ),
    "cohere": Family(
        releases="Command R", special="attention beside the MLP; scaled logits", source="CohereLabs/c4ai-command-r-v01"
    ),
    "cohere2": Family(
        releases="Command R7B, Command A",
        special="attention beside the MLP; three of four blocks with a sliding window, others without rope",
    ),
    "deepseek_v2": Family(
        releases="DeepSeek-V2, V2.5",
        special="latent attention (MLA); experts beside shared ones",
        source="deepseek-ai/DeepSeek-V2-Lite",
    ),
    "deepseek_v3": Family(
        releases="DeepSeek-V3, R1, Kimi K2",
        special="latent attention (MLA); experts in groups, chosen with a bias",
        source="deepseek-ai/DeepSeek-V3",
    ),
    "ernie4_5": Family(releases="ERNIE 4.5 0.3B", special="rope on neighbouring channels"),
    "ernie4_5_moe": Family(
        releases="ERNIE 4.5 21B-A3B, 300B-A47B", special="experts beside shared ones, chosen with a bias"
    ),
    "exaone4": Family(releases="EXAONE 4.0", special="norms behind attention and MLP; norms of queries and keys"),
    "falcon_h1": Family(
        releases="Falcon-H1", special="attention beside a Mamba-2 mixer in every block; multipliers everywhere"
    ),
    "gemma": Family(releases="Gemma", special="scaled embeddings; norms of 1 + weight"),
    "gemma2": Family(
        releases="Gemma 2",
        special="norms before and after; soft-capping; every other block with a sliding window",
        source="google/gemma-2-2b",
    ),
    "gemma3": Family(
        releases="Gemma 3 4B, 12B, 27B",
        special="as Gemma 3 1B, with a SigLIP tower",
        source="google/gemma-3-4b-it",
    ),
    "gemma3_text": Family(
        releases="Gemma 3 270M, 1B",
        special="norms before and after; five of six blocks with a sliding window and a rope of their own",
        source="google/gemma-3-1b-it",
    ),
    "gemma3n": Family(
        releases="Gemma 3n E2B, E4B",
        special="four streams (AltUp); inputs of every block's own; keys and values shared from block 20 on",
        known_miss="llama.cpp divides the variance behind sparse activations by n - 1",
    ),
    "gemma4": Family(
        releases="Gemma 4 31B",
        special="values are keys in blocks of full attention; their heads are twice as wide",
        source="google/gemma-4-31B-it",
    ),
    "gemma4_e": Family(
        releases="Gemma 4 E2B, E4B",
        special="inputs of every block's own; last blocks share keys and values, and have wider MLPs",
        source="google/gemma-4-E2B-it",
    ),
    "gemma4_moe": Family(
        releases="Gemma 4 26B-A4B",
        special="experts beside an MLP, two norms behind them",
        source="google/gemma-4-26B-A4B",
    ),
    "glm4": Family(
        releases="GLM-4 0414, GLM-Z1", special="norms before and after; fused gate, up; rope on half of each head"
    ),
    "glm4_moe": Family(
        mtp=True, releases="GLM-4.5, 4.6, 4.7", special="experts beside a shared one, chosen with a bias"
    ),
    "glm4_moe_lite": Family(
        mtp=True,
        releases="GLM-4.7-Flash",
        special="latent attention (MLA); experts beside a shared one",
    ),
    "gpt2": Family(
        releases="GPT-2", special="weights stored [in, out]; fused q, k, v", source="openai-community/gpt2-large"
    ),
    "gpt_neox": Family(releases="GPT-NeoX, Pythia", special="attention beside the MLP; q, k, v interleaved by head"),
    "gpt_oss": Family(
        releases="gpt-oss 20b, 120b",
        special="experts stored [in, out], gate and up interleaved, with biases; attention sinks",
        source="openai/gpt-oss-20b",
        known_miss="llama.cpp rounds YaRN's corner frequencies, which config.json says not to (truncate)",
    ),
    "granite": Family(releases="Granite 3", special="multipliers of embeddings, attention, residuals and logits"),
    "granitemoe": Family(
        releases="Granite 3 MoE (1B-A400M, 3B-A800M)", special="as Granite 3, with experts: fused gate, up"
    ),
    "granitemoehybrid": Family(
        releases="Granite 4 (H-Small, H-Tiny, H-Micro)", special="Mamba-2 blocks; experts beside a shared one; no rope"
    ),
    "hunyuan_dense": Family(releases="Hunyuan 0.5B to 7B", special="norms of queries and keys behind the rope"),
    "jamba": Family(releases="Jamba", special="Mamba blocks; experts in every other block; no rope"),
    "lfm2": Family(
        releases="LFM2, LFM2.5", special="blocks of short convolutions", source="LiquidAI/LFM2.5-Embedding-350M"
    ),
    "lfm2_moe": Family(releases="LFM2 8B-A1B", special="as LFM2, with experts chosen with a bias"),
    "llama": Family(
        releases="Llama 2, 3, 3.1, 3.2, 3.3; SmolLM2 and many others",
        special="all rope types; biases",
        source="meta-llama/Llama-3.2-1B-Instruct",
    ),
    "llava": Family(
        releases="Pixtral 12B (mistral-community)", special="Llama or Mistral with a Pixtral tower", tried=False
    ),
    "mamba2": Family(releases="Mamba-2, Codestral Mamba", special="no attention"),
    "minimax_m2": Family(
        releases="MiniMax-M2, M2.1, M2.5, M2.7",
        special="norms over all queries and all keys; experts chosen with a bias",
        source="MiniMaxAI/MiniMax-M2",
    ),
    "ministral3": Family(
        releases="text part of Ministral 3, Devstral 2",
        special="YaRN; queries scaled by position",
        source="mistralai/Devstral-Small-2-24B-Instruct-2512",
    ),
    "mistral": Family(releases="Mistral 7B", special="sliding window", source="mistralai/Mistral-7B-v0.1"),
    "mistral3": Family(
        releases="Mistral Small 3.1, 3.2, Ministral 3, Devstral Small 2",
        special="Mistral or Ministral 3 with a Pixtral tower and a patch merger",
        source="mistralai/Devstral-Small-2-24B-Instruct-2512",
    ),
    "mixtral": Family(releases="Mixtral 8x7B, 8x22B", special="experts", source="mistralai/Mixtral-8x7B-v0.1"),
    "nemotron": Family(
        releases="Nemotron-4, Minitron", special="norms of 1 + weight with biases; squared ReLU, no gate"
    ),
    "nemotron_h": Family(
        releases="Nemotron 3 Nano, Super",
        special="every block is Mamba-2, attention or experts without gates",
        source="nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B",
    ),
    "nemotron_h_dense": Family(
        releases="Nemotron-H",
        special="every block is Mamba-2, attention or an MLP without gate",
        source="nvidia/Nemotron-H-56B-Base-8K",
    ),
    "olmo2": Family(releases="OLMo 2", special="norms behind attention and MLP; norms over all queries and all keys"),
    "olmo3": Family(releases="Olmo 3", special="as OLMo 2; three of four blocks with a sliding window; YaRN"),
    "olmoe": Family(releases="OLMoE", special="experts; norms over all queries and all keys"),
    "phi3": Family(
        releases="Phi-3, Phi-3.5, Phi-4",
        special="fused q, k, v and gate, up",
        source="microsoft/Phi-3-mini-4k-instruct",
    ),
    "qwen2": Family(releases="Qwen2, Qwen2.5, QwQ", special="biases of q, k and v", source="Qwen/Qwen2.5-7B"),
    "qwen2_5_vl": Family(
        releases="Qwen2.5-VL",
        special="Qwen2.5 with a tower; measured with the rope of text",
        source="Qwen/Qwen2.5-VL-7B-Instruct",
    ),
    "qwen2_moe": Family(releases="Qwen1.5-MoE, Qwen2-57B-A14B", special="experts beside a shared one with a gate"),
    "qwen2_vl": Family(releases="Qwen2-VL", special="Qwen2 with a tower; measured with the rope of text", tried=False),
    "qwen3": Family(releases="Qwen3", special="norms of queries and keys", source="Qwen/Qwen3-0.6B"),
    "qwen3_5": Family(
        mtp=True,
        releases="Qwen3.5, Qwen3.6",
        special="three of four blocks of linear attention, whose value heads llama.cpp reorders; gated attention",
        source="Qwen/Qwen3.5-27B",
    ),
    "qwen3_5_moe": Family(
        mtp=True,
        releases="Qwen3.5, Qwen3.6 with experts (35B-A3B)",
        special="as Qwen3.5, with experts beside a shared one with a gate",
        source="Qwen/Qwen3.5-35B-A3B",
    ),
    "qwen3_5_moe_text": Family(
        mtp=True,
        releases="Qwen3.8 with experts",
        special="as Qwen3.5 with experts, without vision",
        source="Qwen/Qwen3.8-2.4T-A95B",
    ),
    "qwen3_5_text": Family(
        mtp=True, releases="Qwen3.8", special="as Qwen3.5, without vision", source="Qwen/Qwen3.8-27B"
    ),
    "qwen3_moe": Family(
        releases="Qwen3-30B-A3B, 235B-A22B, Coder",
        special="experts; norms of queries and keys",
        source="Qwen/Qwen3-30B-A3B",
    ),
    "qwen3_next": Family(
        mtp=True,
        releases="Qwen3-Next, Qwen3-Coder-Next",
        special="as Qwen3.5 with experts; q, k, v and z interleaved by head",
        source="Qwen/Qwen3-Next-80B-A3B-Instruct",
    ),
    "qwen3_vl": Family(
        releases="Qwen3-VL",
        special="Qwen3 with a tower that adds to the first blocks, too",
        source="Qwen/Qwen3-VL-4B-Instruct",
    ),
    "seed_oss": Family(releases="Seed-OSS", special="biases of q, k and v"),
    "smollm3": Family(releases="SmolLM3", special="every fourth block without rope"),
    "starcoder2": Family(
        releases="StarCoder2", special="no gate in the MLP; biases everywhere", source="bigcode/starcoder2-7b"
    ),
}
