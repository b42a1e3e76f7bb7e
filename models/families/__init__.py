"""The model families, by the architecture that config.json names; a new one is one file and a word here."""

from models.families import llama, qwen2
from models.rules import Family

FAMILIES: dict[str, Family] = {module.FAMILY.architecture: module.FAMILY for module in (llama, qwen2)}
