"""BambooForCausalLM: Bamboo-7B, and TurboSparse-Mistral, which is Bamboo with predictors inside the checkpoint.

The FFN is h = relu(gate x) * relu(up x), y = down h; the predictor reads the residual before the FFN norm.
"""

from __future__ import annotations

from tsconv.arch.family import ATTENTION, WHOLE, Family, Template

MLP = "model.layers.{n}.mlp."

FAMILY = Family(
    model_type="bamboo",
    whole=WHOLE,
    layer=(
        *ATTENTION,
        Template("blk.{n}.ffn_gate.weight", MLP + "gate_proj.weight", ("n_ff", "n_embd")),
        Template("blk.{n}.ffn_up.weight", MLP + "up_proj.weight", ("n_ff", "n_embd")),
        Template("blk.{n}.ffn_down.weight", MLP + "down_proj.weight", ("n_embd", "n_ff"), "neuron_major"),
    ),
    predictor=(
        Template("blk.{n}.ffn_pred_fc1.weight", MLP + "predictor.fc1.weight", ("rank", "n_embd")),
        Template("blk.{n}.ffn_pred_fc2.weight", MLP + "predictor.fc2.weight", ("n_ff", "rank")),
        Template(
            "blk.{n}.ffn_pred_scale.weight",
            "model.layers.{n}.post_attention_layernorm.weight",
            ("n_embd",),
            "reciprocal",
        ),
    ),
    predictor_input="pre_norm",
)
