"""The network of fsdfm_jax in PyTorch, for evaluation tools that use the Hugging Face Hub.

    model = AutoModelForMaskedLM.from_pretrained(FOLDER, trust_remote_code=True)
    logits_BLV = model(input_ids, t=t_B, h=h_B).logits

A few-step discrete flow-matching language model (arXiv:2509.20624): a bidirectional transformer
over tokens, with adaptive layer norms modulated by time t and step width h. t runs from 0 (noise)
to 1 (data). The logits are those of p(x1 | xt), the posterior of the clean tokens, and equal those
of the JAX network to 1e-4 in float32. An autoregressive network (`AutoModelForCausalLM`) takes
neither t nor h.

`fsdfm_jax` copies this file beside the weights; it needs only torch and transformers.

Letters: B rows, L positions, V vocabulary, D width, H heads, K head width, C conditioning.
"""

import math

import torch
from torch import nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

NUM_FREQUENCIES = 128
ROTARY_BASE = 10_000.0
NORM_EPS = 1e-5
SMALLEST_WIDTH = 2.0**-20

# Tiny defaults; files have their own values.
_DEFAULT = {
    "vocab_size": 8,
    "width": 8,
    "num_blocks": 1,
    "num_heads": 1,
    "cond_width": 8,
    "mlp_ratio": 4,
    "dropout": 0.0,
    "conditioning": "none",
    "positions": "rotary",
    "num_positions": 0,
    "given": "unmarked",
    "causal": False,
}


class FSDFMConfig(PretrainedConfig):
    """The content of config.json.

    Args:
      model: the network, with the fields of `fsdfm_jax.ModelConfig`.
      block_length: tokens per training block.
      **kwargs: of `PretrainedConfig`; other keys of the file are kept.
    """

    model_type = "fsdfm"

    def __init__(self, model=None, block_length=None, **kwargs):
        self.model = _DEFAULT | dict(model or {})
        self.block_length = block_length
        kwargs["vocab_size"] = self.model["vocab_size"]
        kwargs["hidden_size"] = self.model["width"]
        kwargs["num_hidden_layers"] = self.model["num_blocks"]
        kwargs["num_attention_heads"] = self.model["num_heads"]
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)


def sinusoids(values_B):
    """[cos(v f_i), sin(v f_i)] with f_i = 10000^(-i/128), float32 [B, 256]."""
    exponents = torch.arange(NUM_FREQUENCIES, device=values_B.device) / NUM_FREQUENCIES
    angles = values_B.float()[:, None] * (10_000.0**-exponents)[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def rotate(x_BHLK):
    """Rotary embedding of queries or keys; both halves of a head share frequencies."""
    length, width = x_BHLK.shape[-2:]
    exponents = torch.arange(0, width, 2, device=x_BHLK.device) / width
    positions_L = torch.arange(length, device=x_BHLK.device).float()
    angles = positions_L[:, None] * (ROTARY_BASE**-exponents)[None]
    angles = torch.cat([angles, angles], dim=-1)
    first, second = x_BHLK.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x_BHLK.float() * torch.cos(angles) + turned * torch.sin(angles)).to(x_BHLK.dtype)


def linear(layer, x):
    """Apply a dense layer in the precision of its weights."""
    return layer(x.to(layer.weight.dtype))


def modulate(x_BLD, shift_BD, scale_BD):
    """x (1 + scale) + shift, constant over the positions of a row."""
    return x_BLD * (1.0 + scale_BD[:, None]) + shift_BD[:, None]


class Norm(nn.Module):
    """LayerNorm with a scale and no bias, float32."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BLD):
        return functional.layer_norm(
            x_BLD.float(), self.weight.shape, self.weight.float(), eps=NORM_EPS
        )


class Mark(nn.Module):
    """The vector that marks given tokens."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))


class Embedder(nn.Module):
    """Sinusoids, linear, SiLU, linear: maps one number per row to C features."""

    def __init__(self, cond_width):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * NUM_FREQUENCIES, cond_width), nn.SiLU(), nn.Linear(cond_width, cond_width)
        )

    def forward(self, values_B):
        return self.mlp(sinusoids(values_B).to(self.mlp[0].weight.dtype))


class Modulated(nn.Module):
    """Base of blocks and output layer: `parts` modulations of width D, float32."""

    def __init__(self, cfg, parts):
        super().__init__()
        self.parts = parts
        if cfg["causal"]:
            return
        if cfg["conditioning"] == "official":
            self.condition_fuser = nn.Linear(2 * cfg["cond_width"], cfg["cond_width"])
        self.adaLN_modulation = nn.Linear(cfg["cond_width"], parts * cfg["width"])

    def modulation(self, cond_BC):
        """`parts` tensors [B, D]."""
        if hasattr(self, "condition_fuser"):
            cond_BC = functional.silu(linear(self.condition_fuser, cond_BC))
        return linear(self.adaLN_modulation, cond_BC).float().chunk(self.parts, dim=-1)


class Block(Modulated):
    """x + gate * dropout(branch(LN(x) (1 + scale) + shift)), for attention, then for the MLP."""

    def __init__(self, cfg):
        super().__init__(cfg, 6)
        width, hidden = cfg["width"], cfg["mlp_ratio"] * cfg["width"]
        self.heads, self.dropout, self.causal = cfg["num_heads"], cfg["dropout"], cfg["causal"]
        self.norm1, self.norm2 = Norm(width), Norm(width)
        self.qw = nn.Linear(width, width, bias=False)
        self.kw = nn.Linear(width, width, bias=False)
        self.vw = nn.Linear(width, width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width)
        )

    def forward(self, x_BLD, cond_BC):
        if cond_BC is None:
            zero = x_BLD.new_zeros(1, x_BLD.shape[-1])
            shift1 = scale1 = shift2 = scale2 = zero
            gate1 = gate2 = zero + 1.0
        else:
            shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond_BC)
        branch = self.attention(modulate(self.norm1(x_BLD), shift1, scale1))
        x_BLD = x_BLD + gate1[:, None] * self.drop(branch)
        branch = modulate(self.norm2(x_BLD), shift2, scale2)
        branch = self.mlp(branch.to(self.mlp[0].weight.dtype))
        return x_BLD + gate2[:, None] * self.drop(branch)

    def drop(self, branch):
        """Dropout in training, float32."""
        return functional.dropout(branch.float(), self.dropout, self.training)

    def attention(self, x_BLD):
        """Bidirectional attention, or causal for an autoregressive network."""
        batch, length, width = x_BLD.shape
        q, k, v = (
            linear(layer, x_BLD).view(batch, length, self.heads, -1).transpose(1, 2)
            for layer in (self.qw, self.kw, self.vw)
        )
        mixed_BHLK = functional.scaled_dot_product_attention(
            rotate(q), rotate(k), v, is_causal=self.causal
        )
        return self.attn_out(mixed_BHLK.transpose(1, 2).reshape(batch, length, width))


class OutputLayer(Modulated):
    """The modulated head."""

    def __init__(self, cfg):
        super().__init__(cfg, 2)
        self.norm_final = Norm(cfg["width"])
        self.linear = nn.Linear(cfg["width"], cfg["vocab_size"])

    def forward(self, x_BLD, cond_BC):
        x_BLD = self.norm_final(x_BLD)
        if cond_BC is not None:
            x_BLD = modulate(x_BLD, *self.modulation(cond_BC))
        return linear(self.linear, x_BLD).float()


class FSDFMModel(PreTrainedModel):
    """Maps tokens and times to the logits of the clean tokens."""

    config_class = FSDFMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _no_split_modules = ("Block",)
    # A buffer of the published files, determined by the head width.
    _keys_to_ignore_on_load_unexpected = (r"rotary_emb\.inv_freq",)

    def __init__(self, config):
        super().__init__(config)
        self.network = cfg = config.model
        self.vocab_embed = nn.Embedding(cfg["vocab_size"], cfg["width"])
        if cfg["positions"] == "learned":
            self.position_embed = nn.Embedding(cfg["num_positions"], cfg["width"])
        if cfg["given"] == "marked":
            self.given_embed = Mark(cfg["width"])
        if not cfg["causal"]:
            self.time_embedding = Embedder(cfg["cond_width"])
        if cfg["conditioning"] != "none":
            self.dt_embedding = Embedder(cfg["cond_width"])
        if cfg["conditioning"] == "official":
            self.time_condition_fuser = nn.Linear(2 * cfg["cond_width"], 2 * cfg["cond_width"])
        if cfg["conditioning"] == "additive":
            self.dt_proj = nn.Linear(cfg["cond_width"], cfg["cond_width"], bias=False)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg["num_blocks"]))
        self.output_layer = OutputLayer(cfg)
        self.post_init()

    def get_input_embeddings(self):
        """Return the token embedding."""
        return self.vocab_embed

    def get_output_embeddings(self):
        """Return the head."""
        return self.output_layer.linear

    def forward(
        self, input_ids, t=None, h=None, given=None, attention_mask=None, labels=None, **unused
    ):
        """Logits of each position.

        Args:
          input_ids: tokens, int [B, L].
          t: time of each row in [0, 1], [B] or a number; unused by an autoregressive network.
          h: width of the next step, [B] or a number; required by few-step networks.
          given: which tokens are given (a prompt), bool [B, L]; None: none. Seen only by networks
            whose config has given="marked".
          attention_mask: must be all ones, since the networks are trained on full blocks.
          labels: not supported; the weighting of times is part of the training.
          **unused: other arguments that `transformers` passes to any model.

        Returns:
          `MaskedLMOutput` with logits, float32 [B, L, V].

        Raises:
          ValueError: for a missing time or width, padding, labels, or more tokens than learned
            positions.
        """
        if labels is not None:
            raise ValueError("The model computes no loss; omit labels and use the logits.")
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError("The model needs full blocks without padding (attention_mask).")
        cond_BC = None if self.network["causal"] else self.condition(input_ids, t, h)
        x_BLD = self.vocab_embed(input_ids).float()
        if self.network["positions"] == "learned":
            most = self.network["num_positions"]
            if input_ids.shape[1] > most:
                raise ValueError(
                    f"The network has {most} positions, got a block of {input_ids.shape[1]} tokens."
                )
            x_BLD = x_BLD + self.position_embed.weight[: input_ids.shape[1]].float()[None]
        if self.network["given"] == "marked" and given is not None:
            x_BLD = x_BLD + given[..., None] * self.given_embed.weight.float()
        for block in self.blocks:
            x_BLD = block(x_BLD, cond_BC)
        return MaskedLMOutput(logits=self.output_layer(x_BLD, cond_BC))

    def condition(self, input_ids, t, h):
        """Features [B, C] of times and widths, [B, 2C] with conditioning "official"."""
        how = self.network["conditioning"]
        time = self.time_embedding(_per_row("t", t, input_ids))
        if how == "none":
            return functional.silu(time)
        h_B = _per_row("h", h, input_ids)
        if how == "official":
            both = torch.cat([time, self.dt_embedding(h_B)], dim=-1)
            return functional.silu(self.time_condition_fuser(both))
        halvings_B = -torch.log2(h_B.clamp(min=SMALLEST_WIDTH))
        return functional.silu(time + self.dt_proj(self.dt_embedding(halvings_B)))

    def _init_weights(self, module):
        """Initialise weights as in training: modulations and head are zero."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            fan = sum(module.weight.shape)
            nn.init.uniform_(module.weight, -math.sqrt(6 / fan), math.sqrt(6 / fan))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, Norm):
            nn.init.ones_(module.weight)
        if isinstance(module, Modulated) and hasattr(module, "adaLN_modulation"):
            nn.init.zeros_(module.adaLN_modulation.weight)
        if isinstance(module, OutputLayer):
            nn.init.zeros_(module.linear.weight)


def _per_row(name, value, input_ids):
    """Expand to one number per row, float32 [B]."""
    if value is None:
        what = "time t" if name == "t" else "step width h"
        raise ValueError(f"The network needs the {what} of each row, got None; give {name}=.")
    value = torch.as_tensor(value, dtype=torch.float32, device=input_ids.device)
    if value.ndim and value.shape != input_ids.shape[:1]:
        raise ValueError(
            f"{name} must hold one number per row, shape {tuple(input_ids.shape[:1])}, got "
            f"{tuple(value.shape)}."
        )
    return value.expand(input_ids.shape[0])
