"""The model families, by the architecture that config.json names; a new one is one file and a word here."""

from models.families import gpt_oss, llama, olmo2, olmo3, qwen2, qwen3, qwen3_moe
from models.families.family import Family

FAMILIES: dict[str, Family] = {
    module.FAMILY.architecture: module.FAMILY for module in (llama, qwen2, qwen3, qwen3_moe, olmo2, olmo3, gpt_oss)
}


def family_named(name: str) -> Family:
    """The family of a description."""
    return next(family for family in FAMILIES.values() if family.name == name)
