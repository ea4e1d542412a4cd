"""What a model computes, as data: a stream of hidden states, and the layers that add to it.

Nothing here names a file or an architecture; `architectures` makes these from a file's metadata. A layer is a
sequence of branches, each of which adds to the residual stream: ``x += body(norm(x))``. Every body states the
tensors it has by role, and what a token of it costs in the cache; the loader checks and places models by
that, and the worker's blocks compute them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

_DEFAULT_CONTEXT = 4096
#: Keys and values are cached as float16.
_CACHE_ELEMENT_BYTES = 2

RopeStyle = Literal["norm", "neox"]
RopeScaling = Literal["none", "linear", "yarn"]
#: Role to shape; matrices are (rows out, columns in).
Shapes = dict[str, tuple[int, ...]]


class UnsupportedModelError(ValueError):
    """A sound file whose model this version cannot run."""


class _Configuration(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class RopeConfig(_Configuration):
    """Rotary position embedding.

    Attributes:
        style: "norm" rotates interleaved pairs (0, 1), (2, 3), ...; "neox" rotates (i, i + n_rot / 2).
        n_rot: leading elements of a head that are rotated.
        base: of the geometric series of frequencies.
        factor: by how much the context was stretched; positions are divided by it.
        original_context: context length in tokens before it was stretched (yarn).
        attention_factor: multiplies cosines and sines, on top of yarn's own magnitude.
        beta_fast, beta_slow: rotations within the original context above which a frequency is kept, and below
            which it is fully stretched (yarn). llama.cpp reads no key for them in these architectures.
    """

    style: RopeStyle
    n_rot: int = Field(gt=0, multiple_of=2)
    base: float = Field(gt=1.0)
    scaling: RopeScaling
    factor: float = Field(gt=0.0)
    original_context: int = Field(gt=0)
    attention_factor: float = Field(gt=0.0)
    beta_fast: float = 32.0
    beta_slow: float = 1.0


class AttentionConfig(_Configuration):
    """Causal attention over all earlier tokens of a sequence, whose keys and values are cached.

    Attributes:
        n_heads, n_kv_heads: query heads and key/value heads; the former is a multiple of the latter.
        head_dim: elements of a query or key head; value_dim: of a value head.
        scale: multiplies the products of queries and keys.
        qk_norm: query and key heads are normalized, each head by itself, before they are rotated.
        rope: how queries and keys are rotated.
    """

    n_heads: int = Field(gt=0)
    n_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    value_dim: int = Field(gt=0)
    scale: float = Field(gt=0.0)
    qk_norm: bool
    rope: RopeConfig

    @model_validator(mode="after")
    def _check_heads(self) -> AttentionConfig:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.n_heads} heads cannot share {self.n_kv_heads} key/value heads evenly")
        if self.rope.n_rot > self.head_dim:
            raise ValueError(f"{self.rope.n_rot} rotated elements exceed the head size {self.head_dim}")
        return self

    @property
    def n_q(self) -> int:
        """Width of all query heads together."""
        return self.n_heads * self.head_dim

    @property
    def n_k(self) -> int:
        """Width of all key heads together."""
        return self.n_kv_heads * self.head_dim

    @property
    def n_v(self) -> int:
        """Width of all value heads together."""
        return self.n_kv_heads * self.value_dim

    @property
    def n_mixed(self) -> int:
        """Width of the weighted values, which the output matrix reads."""
        return self.n_heads * self.value_dim

    @property
    def key_bytes(self) -> int:
        """Bytes of one token's keys in the cache."""
        return self.n_k * _CACHE_ELEMENT_BYTES

    @property
    def value_bytes(self) -> int:
        """Bytes of one token's values in the cache."""
        return self.n_v * _CACHE_ELEMENT_BYTES

    @property
    def cache_bytes(self) -> int:
        """Bytes of one token in the cache."""
        return self.key_bytes + self.value_bytes

    def tensors(self, n_embd: int) -> Shapes:
        """Its tensors in a model whose stream is `n_embd` wide."""
        shapes: Shapes = {
            "attn_q": (self.n_q, n_embd),
            "attn_k": (self.n_k, n_embd),
            "attn_v": (self.n_v, n_embd),
            "attn_output": (n_embd, self.n_mixed),
        }
        if self.qk_norm:
            shapes |= {"attn_q_norm": (self.head_dim,), "attn_k_norm": (self.head_dim,)}
        return shapes


class FeedForwardConfig(_Configuration):
    """A gated feed-forward: the product of a silu gate and a projection, projected back.

    Attributes:
        n_ff: width of gate and projection.
    """

    n_ff: int = Field(gt=0)

    @property
    def cache_bytes(self) -> int:
        """It keeps nothing of a token."""
        return 0

    def tensors(self, n_embd: int) -> Shapes:
        """Its tensors in a model whose stream is `n_embd` wide."""
        hidden = (self.n_ff, n_embd)
        return {"ffn_gate": hidden, "ffn_up": hidden, "ffn_down": (n_embd, self.n_ff)}


#: What a branch computes.
Body = AttentionConfig | FeedForwardConfig


class Branch(_Configuration):
    """One addition to the residual stream: ``x += body(norm(x))``.

    Attributes:
        norm: role of the weight of the root mean square norm before the body.
        body: what is computed of the normalized stream.
    """

    norm: str
    body: Body

    def tensors(self, n_embd: int) -> Shapes:
        """The norm's weight, and the body's tensors."""
        return {self.norm: (n_embd,), **self.body.tensors(n_embd)}


class LayerConfig(_Configuration):
    """A layer: its branches, one after the other."""

    branches: tuple[Branch, ...] = Field(min_length=1)

    @property
    def attention(self) -> tuple[AttentionConfig, ...]:
        """The bodies that attend, in order."""
        return tuple(branch.body for branch in self.branches if isinstance(branch.body, AttentionConfig))

    @property
    def cache_bytes(self) -> int:
        """Bytes of one token in the cache."""
        return sum(branch.body.cache_bytes for branch in self.branches)

    def tensors(self, n_embd: int) -> Shapes:
        """The tensors of all branches."""
        return {role: shape for branch in self.branches for role, shape in branch.tensors(n_embd).items()}


class ModelConfig(_Configuration):
    """A decoder-only model: token embedding, layers, a norm and the output matrix.

    Attributes:
        n_embd: width of the residual stream.
        n_vocab: rows of the token embedding.
        context_length: tokens the model was made for.
        norm_eps: of the root mean square norms.
        tied_embeddings: the token embedding is also the output matrix.
        layers: in order; they may differ.
    """

    architecture: str
    name: str
    n_embd: int = Field(gt=0)
    n_vocab: int = Field(gt=0)
    context_length: int = Field(gt=0)
    norm_eps: float = Field(gt=0.0)
    tied_embeddings: bool
    layers: tuple[LayerConfig, ...] = Field(min_length=1)

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def default_context(self) -> int:
        """Tokens of a sequence where nobody asks for more: long contexts cost cache."""
        return min(self.context_length, _DEFAULT_CONTEXT)

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The different rotary embeddings of the layers."""
        return tuple(dict.fromkeys(body.rope for layer in self.layers for body in layer.attention))
