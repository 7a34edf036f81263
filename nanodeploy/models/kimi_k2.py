"""Kimi-K2 (arXiv:2507.20534): DeepSeek-V3 with other sizes, all experts in one group, and no layers that draft.

transformers has no class for its model_type; DeepseekV3ForCausalLM computes the same.
"""

from nanodeploy.models import deepseek_v3
from nanodeploy.models.deepseek_v3 import Shape

__all__ = ["Model", "Shape"]


class Model(deepseek_v3.Model):
    def __init__(self, shape: Shape):
        super().__init__(shape)
        # Written by the trainer's rotary layers; they follow from rope_theta and rope_scaling.
        self.ignored_tensors += ("model.layers.*.self_attn.rotary_emb.inv_freq",)
