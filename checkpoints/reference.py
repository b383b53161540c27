"""Plain PyTorch float32 reference of the dReLU model families: one file, written from the formulas.

    TurboSparse-Mistral   FFN with a predictor that reads the residual before post_attention_layernorm
    TurboSparse-Mixtral   8 experts, top 2; each expert has a predictor that reads the expert's own (normed) input
    Bamboo                FFN without predictor tensors; predictors in separate files model_{0..}.pt

    h = relu(W_gate x) * relu(W_up x) * mask        y = W_down h        mask = [fc2 relu(fc1 p) > 0]

With `keep` the mask is top-k instead (arXiv:2406.05955, equations 3 and 4): the `keep` neurons of the largest |h|.

Parameters carry the checkpoints' tensor names, so a state dict is a checkpoint (but for the experts' w1, w3, w2, see
EXPERT_NAMES). Shapes: B sequences, T positions, S = rows handed to one FFN, E = n_embd, F = n_ff, V = n_vocab.

Reference.load(directory).logits(tokens) is what other implementations are compared with; evaluate.py prints perplexity,
activity and samples; train.py trains the two small checkpoints beside this file with it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

EXPERT_NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
MODEL_TYPES = {"bamboo": "dense", "turbosparsemixtral": "moe"}
SPARSITY = ("predictor", "exact")


@dataclass(frozen=True)
class Config:
    n_vocab: int
    n_embd: int
    n_ff: int
    n_layer: int
    n_head: int
    n_head_kv: int
    n_expert: int = 0  # 0: one dense FFN per layer
    n_expert_used: int = 0
    rope_theta: float = 10000.0
    rms_eps: float = 1e-5
    window: int | None = None  # sliding attention window, in positions

    @classmethod
    def read(cls, path: Path) -> Config:
        """From a Hugging Face config.json. Raises ValueError for a model that is not one of the families."""
        c = json.loads(path.read_text())
        if c.get("model_type") not in MODEL_TYPES:
            raise ValueError(f"{path}: model_type is {c.get('model_type')!r}, expected one of {list(MODEL_TYPES)}")
        if c["hidden_act"] != "relu":
            raise ValueError(f"{path}: hidden_act is {c['hidden_act']!r}, expected 'relu'")
        moe = MODEL_TYPES[c["model_type"]] == "moe"
        return cls(
            n_vocab=c["vocab_size"],
            n_embd=c["hidden_size"],
            n_ff=c["intermediate_size"],
            n_layer=c["num_hidden_layers"],
            n_head=c["num_attention_heads"],
            n_head_kv=c["num_key_value_heads"],
            n_expert=c["num_local_experts"] if moe else 0,
            n_expert_used=c["num_experts_per_tok"] if moe else 0,
            rope_theta=c["rope_theta"],
            rms_eps=c["rms_norm_eps"],
            window=c.get("sliding_window"),
        )


def linear(n_in: int, n_out: int) -> nn.Linear:
    return nn.Linear(n_in, n_out, bias=False)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight"""

    def __init__(self, n: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n)), eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def rope_tables(n_pos: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [n_pos, head_dim] of pos * theta^(-2i/head_dim), the angles repeated for both halves."""
    inv_freq = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(n_pos, dtype=torch.float32), inv_freq).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate_half(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a) on the two halves of the head: dimension i turns with i + head_dim/2 (Hugging Face layout)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


class Attention(nn.Module):
    """Causal grouped-query attention: query head j reads key/value head j // (n_head / n_head_kv)."""

    def __init__(self, c: Config):
        super().__init__()
        self.n_head, self.n_head_kv, self.head_dim = c.n_head, c.n_head_kv, c.n_embd // c.n_head
        self.q_proj = linear(c.n_embd, c.n_head * self.head_dim)
        self.k_proj = linear(c.n_embd, c.n_head_kv * self.head_dim)
        self.v_proj = linear(c.n_embd, c.n_head_kv * self.head_dim)
        self.o_proj = linear(c.n_head * self.head_dim, c.n_embd)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x [B, T, E]
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(B, T, self.n_head_kv, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.n_head_kv, self.head_dim).transpose(1, 2)
        q = q * cos + rotate_half(q) * sin
        k = k * cos + rotate_half(k) * sin
        k, v = (t.repeat_interleave(self.n_head // self.n_head_kv, dim=1) for t in (k, v))
        score = (q @ k.transpose(-2, -1)) / self.head_dim**0.5  # [B, n_head, T, T]
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        y = score.masked_fill(future, float("-inf")).softmax(-1) @ v
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class Predictor(nn.Module):
    """Two matrices without bias, E -> rank -> F. Its output is one logit per neuron."""

    def __init__(self, n_embd: int, rank: int, n_ff: int):
        super().__init__()
        self.fc1, self.fc2 = linear(n_embd, rank), linear(rank, n_ff)

    def forward(self, p: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(p)))


class FFN(nn.Module):
    """dReLU FFN. `predictor` is None, or attached; `inclusive` makes a logit equal to the threshold count as on."""

    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.layer = layer
        self.gate_proj, self.up_proj = linear(c.n_embd, c.n_ff), linear(c.n_embd, c.n_ff)
        self.down_proj = linear(c.n_ff, c.n_embd)
        self.predictor: Predictor | None = None
        self.threshold, self.inclusive = 0.0, False
        self.keep: int | None = None

    def predicted(self, logit: Tensor) -> Tensor:
        """round(sigmoid(z)) rounds 0.5 down: on iff z > 0 (TurboSparse). Bamboo's engine: on iff z >= threshold."""
        return logit >= self.threshold if self.inclusive else logit > self.threshold

    def forward(self, x: Tensor, p: Tensor, masked: bool, probe=None) -> Tensor:
        """x [S, E] normed input, p [S, E] predictor input -> [S, E].
        probe(ffn, p, gate, h, logit) sees p and three times [S, F]: the gate, h before the mask, the predictor."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        h = F.relu(gate) * F.relu(up)
        logit = None
        if self.predictor is not None and (masked or probe):
            logit = self.predictor(p.detach())  # in training, the mask is a constant of the language model's loss
        if probe:
            probe(self, p, gate, h, logit)
        if masked:
            if logit is None:
                raise ValueError(f"layer {self.layer} has no predictor: pass predictor_dir, or sparsity='exact'")
            h = h * self.predicted(logit)
        if self.keep is not None:
            h = h * torch.zeros_like(h).scatter(-1, h.abs().topk(self.keep, dim=-1).indices, 1.0)
        return self.down_proj(h)


class MoE(nn.Module):
    """Router: softmax over all experts, keep the n_expert_used largest, scale them to sum 1."""

    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.n_used = c.n_expert_used
        self.gate = linear(c.n_embd, c.n_expert)
        self.experts = nn.ModuleList(FFN(c, layer) for _ in range(c.n_expert))

    def forward(self, x: Tensor, masked: bool, probe=None, route=None) -> Tensor:  # x [S, E] normed
        share = self.gate(x).softmax(-1)  # [S, n_expert]
        weight, chosen = share.topk(self.n_used, dim=-1)  # [S, n_used]
        weight = weight / weight.sum(-1, keepdim=True)
        if route:
            route(share, chosen)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            row, slot = (chosen == e).nonzero(as_tuple=True)
            if len(row):
                own = x[row]  # the predictor reads the normed state here
                y = y.index_add(0, row, expert(own, own, masked, probe) * weight[row, slot, None])
        return y


class Block(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(c.n_embd, c.rms_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.n_embd, c.rms_eps)
        if c.n_expert:
            self.block_sparse_moe = MoE(c, layer)
        else:
            self.mlp = FFN(c, layer)

    @property
    def ffns(self) -> list[FFN]:
        return list(self.block_sparse_moe.experts) if hasattr(self, "block_sparse_moe") else [self.mlp]

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, masked: bool, probe=None, route=None) -> Tensor:
        p = x + self.self_attn(self.input_layernorm(x), cos, sin)  # p: the pre-norm residual
        rows, normed = p.flatten(0, 1), self.post_attention_layernorm(p).flatten(0, 1)
        if hasattr(self, "block_sparse_moe"):
            y = self.block_sparse_moe(normed, masked, probe, route)
        else:
            y = self.mlp(normed, rows, masked, probe)
        return p + y.view_as(p)


class Reference(nn.Module):
    def __init__(self, config: Config, ranks: list[int] | None = None):
        """ranks: predictor rank of each layer; None leaves the FFNs without predictors."""
        super().__init__()
        self.config = c = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c.n_vocab, c.n_embd)
        self.model.layers = nn.ModuleList(Block(c, i) for i in range(c.n_layer))
        self.model.norm = RMSNorm(c.n_embd, c.rms_eps)
        self.lm_head = linear(c.n_embd, c.n_vocab)
        if ranks:
            self.attach_predictors(ranks)

    def attach_predictors(self, ranks: list[int]) -> None:
        for block, rank in zip(self.model.layers, ranks, strict=True):
            for ffn in block.ffns:
                ffn.predictor = Predictor(self.config.n_embd, rank, self.config.n_ff)

    def forward(self, tokens: Tensor, masked: bool, probe=None, route=None) -> Tensor:
        """tokens int64 [B, T], every sequence from position 0 -> logits float32 [B, T, V]."""
        c = self.config
        if c.window and tokens.shape[1] > c.window:
            raise ValueError(f"{tokens.shape[1]} tokens exceed the attention window of {c.window}")
        cos, sin = rope_tables(tokens.shape[1], c.n_embd // c.n_head, c.rope_theta)
        x = self.model.embed_tokens(tokens)
        for block in self.model.layers:
            x = block(x, cos, sin, masked, probe, route)
        return self.lm_head(self.model.norm(x))

    # ---- checkpoints ----

    @classmethod
    def load(cls, directory, predictor_dir=None) -> Reference:
        """Reads config.json and *.safetensors, any float type, as float32; predictor_dir holds Bamboo's model_N.pt.
        Raises RuntimeError (torch) when tensors are missing, unexpected, or of another shape."""
        directory = Path(directory)
        config = Config.read(directory / "config.json")
        state = {}
        for name, tensor in read_tensors(directory).items():
            parts = [EXPERT_NAMES.get(part, part) for part in name.split(".")]
            state[".".join(parts)] = tensor.float()
        ffn = "block_sparse_moe.experts.0" if config.n_expert else "mlp"
        fc1 = [state.get(f"model.layers.{i}.{ffn}.predictor.fc1.weight") for i in range(config.n_layer)]
        ref = cls(config, [w.shape[0] for w in fc1] if fc1[0] is not None else None)
        ref.load_state_dict(state)
        if predictor_dir is not None:
            ref.load_predictors(Path(predictor_dir))
        return ref.eval().requires_grad_(False)

    def load_predictors(self, directory: Path) -> None:
        """Bamboo: one pickle-free state dict per layer, and an optional config.json with sparse_threshold."""
        if self.config.n_expert:
            raise ValueError(f"{directory}: separate predictors exist for dense models only")
        files = [directory / f"model_{i}.pt" for i in range(self.config.n_layer)]
        states = [torch.load(f, weights_only=True, map_location="cpu") for f in files]
        self.attach_predictors([s["fc1.weight"].shape[0] for s in states])
        options = directory / "config.json"
        threshold = json.loads(options.read_text()).get("sparse_threshold", 0.0) if options.exists() else 0.0
        for block, state in zip(self.model.layers, states, strict=True):
            block.mlp.predictor.load_state_dict({k: v.float() for k, v in state.items()})
            block.mlp.threshold, block.mlp.inclusive = float(threshold), True

    # ---- what the tests compare with ----

    def keep_largest(self, keep: int | None) -> None:
        """From now on every FFN keeps so many neurons of each row; None: no top-k."""
        for block in self.model.layers:
            for ffn in block.ffns:
                ffn.keep = keep

    @torch.no_grad()
    def logits(self, tokens, sparsity: str = "predictor") -> Tensor:
        """1-D token ids, one causal sequence from position 0 -> float32 [T, n_vocab].
        sparsity: "predictor" applies the predictor's mask, "exact" computes every neuron."""
        if sparsity not in SPARSITY:
            raise ValueError(f"sparsity is {sparsity!r}, expected one of {SPARSITY}")
        return self(torch.as_tensor(tokens).long()[None], masked=sparsity == "predictor")[0]

    @torch.no_grad()
    def activity(self, tokens, sparsity: str = "predictor") -> list[dict]:
        """Per layer, means over positions (MoE: over routed expert calls) as fractions of n_ff:
        predicted, gate (> 0), active (gate > 0 and up > 0), predicted_active (both); then n_ff and calls (rows seen).
        Without predictors, and with sparsity "exact", the model runs unmasked."""
        c = self.config
        total = [dict(predicted=0, gate=0, active=0, predicted_active=0, calls=0) for _ in range(c.n_layer)]

        def probe(ffn, p, gate, h, logit):
            row = total[ffn.layer]
            active = h > 0  # the unmasked product: gate > 0 and up > 0
            on = ffn.predicted(logit) if logit is not None else torch.ones_like(active)
            for key, seen in (
                ("predicted", on),
                ("gate", gate > 0),
                ("active", active),
                ("predicted_active", on & active),
            ):
                row[key] += int(seen.sum())
            row["calls"] += len(gate)

        has_predictor = self.model.layers[0].ffns[0].predictor is not None
        self(torch.as_tensor(tokens).long()[None], has_predictor and sparsity == "predictor", probe)
        return [
            {k: v if k == "calls" else v / (row["calls"] * c.n_ff) for k, v in row.items()} | {"n_ff": c.n_ff}
            for row in total
        ]


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the shards that model.safetensors.index.json names."""
    index = directory / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return {name: tensor for file in files for name, tensor in load_file(directory / file).items()}
