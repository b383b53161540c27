"""TurboSparseMixtralForCausalLM: Mixtral's mixture of experts with dReLU FFNs and one predictor per expert.

Each expert's FFN is h = relu(w1 x) * relu(w3 x), y = w2 h; its predictor reads the same normed x. The router is a
softmax over all experts, of which the largest num_experts_per_tok are kept and scaled to sum 1, as in llama.cpp.
"""

from __future__ import annotations

from tsconv.arch.family import ATTENTION, WHOLE, Family, Template

MOE = "model.layers.{n}.block_sparse_moe."
EXPERT = MOE + "experts.{e}."

FAMILY = Family(
    model_type="turbosparsemixtral",
    whole=WHOLE,
    layer=(
        *ATTENTION,
        Template("blk.{n}.ffn_gate_inp.weight", MOE + "gate.weight", ("n_expert", "n_embd")),
        Template("blk.{n}.ffn_gate_exps.weight", EXPERT + "w1.weight", ("n_ff", "n_embd")),
        Template("blk.{n}.ffn_up_exps.weight", EXPERT + "w3.weight", ("n_ff", "n_embd")),
        Template("blk.{n}.ffn_down_exps.weight", EXPERT + "w2.weight", ("n_embd", "n_ff"), "neuron_major"),
    ),
    predictor=(
        Template("blk.{n}.ffn_pred_fc1.{e}.weight", EXPERT + "predictor.fc1.weight", ("rank", "n_embd")),
        Template("blk.{n}.ffn_pred_fc2.{e}.weight", EXPERT + "predictor.fc2.weight", ("n_ff", "rank")),
    ),
    predictor_input="normed",
)
