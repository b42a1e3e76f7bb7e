"""The model families, by the architecture that config.json names; a new one is one file and a word here."""

from models.conversion.rules import Family
from models.families import gpt_oss, llama, olmo2, olmo3, qwen2, qwen3, qwen3_moe

FAMILIES: dict[str, Family] = {
    module.FAMILY.architecture: module.FAMILY for module in (llama, qwen2, qwen3, qwen3_moe, olmo2, olmo3, gpt_oss)
}
