"""The vocabularies and hidden sizes that the suite is named by, from the models' configurations."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """A family, and what of it matters here."""

    title: str
    vocabulary: int
    hidden: int


MODELS = {
    "llama2": Model("Llama 2 7B", 32000, 4096),
    "llama3": Model("Llama 3.1 8B", 128256, 4096),
    "deepseek-v3": Model("DeepSeek-V3", 129280, 7168),
    "qwen3": Model("Qwen3 8B", 151936, 4096),
    "glm-5": Model("GLM-5", 154880, 6144),
    "kimi-k2": Model("Kimi-K2", 163840, 7168),
    "gpt-oss": Model("gpt-oss 20B", 201088, 2880),
    "qwen3.5": Model("Qwen3.5 9B", 248320, 4096),
    # 262144 in the text-only ones; this is not a multiple of 128
    "gemma3": Model("Gemma 3 12B", 262208, 3840),
    # for a run of seconds that shows that everything works
    "small": Model("4096 tokens", 4096, 64),
    "odd": Model("8209 tokens", 8209, 96),
    # whose logits over text are measured: real_logits.py
    "smollm2": Model("SmolLM2 135M", 49152, 576),
    "gemma3-270m": Model("Gemma 3 270M", 262144, 640),
}
REAL = ("smollm2", "gemma3-270m")
