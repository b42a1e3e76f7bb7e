"""OLMo 3: OLMo 2 with sliding windows in three layers of four, and a rotary table for each kind of layer."""

from dataclasses import replace

from models.families import olmo2

FAMILY = replace(olmo2.FAMILY, name="olmo3", architecture="Olmo3ForCausalLM", windows=True)
