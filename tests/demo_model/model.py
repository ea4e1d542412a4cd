"""The demo model in PyTorch: Qwen3's architecture, for training and for batched greedy replies."""

from __future__ import annotations

import torch
from demo_model.size import Size
from torch import Tensor, nn
from torch.nn import functional as F


class Norm(nn.Module):
    """Root mean square norm over the last axis, with a gain."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.epsilon)


def rope_tables(size: Size, positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (positions, head_size / 2) float32."""
    pairs = size.head_size // 2
    frequency = size.rope_base ** (-torch.arange(pairs, dtype=torch.float32) / pairs)
    angle = torch.arange(positions, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding over halves of the head (NeoX order); x is (batch, heads, positions, head_size)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Block(nn.Module):
    """One layer: grouped-query attention with normed queries and keys, then a SwiGLU feed-forward."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        q, kv = size.heads * size.head_size, size.kv_heads * size.head_size
        self.attn_norm = Norm(size.width, size.norm_epsilon)
        self.attn_q = nn.Linear(size.width, q, bias=False)
        self.attn_k = nn.Linear(size.width, kv, bias=False)
        self.attn_v = nn.Linear(size.width, kv, bias=False)
        self.attn_q_norm = Norm(size.head_size, size.norm_epsilon)
        self.attn_k_norm = Norm(size.head_size, size.norm_epsilon)
        self.attn_output = nn.Linear(q, size.width, bias=False)
        self.ffn_norm = Norm(size.width, size.norm_epsilon)
        self.ffn_gate = nn.Linear(size.width, size.feed_forward, bias=False)
        self.ffn_up = nn.Linear(size.width, size.feed_forward, bias=False)
        self.ffn_down = nn.Linear(size.feed_forward, size.width, bias=False)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x (batch, positions, width), each (batch, heads, positions, head)."""
        size = self.size
        weight = torch.cat((self.attn_q.weight, self.attn_k.weight, self.attn_v.weight))
        qkv = F.linear(self.attn_norm(x), weight).unflatten(-1, (-1, size.head_size)).transpose(1, 2)
        q, k, v = qkv.split((size.heads, size.kv_heads, size.kv_heads), dim=1)
        q, k = rotate(self.attn_q_norm(q), cos, sin), rotate(self.attn_k_norm(k), cos, sin)
        return q.to(v.dtype), k.to(v.dtype), v

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The layer's output from its input and what attention gave."""
        x = x + self.attn_output(attended.transpose(1, 2).flatten(-2))
        gate_up = F.linear(self.ffn_norm(x), torch.cat((self.ffn_gate.weight, self.ffn_up.weight)))
        gate, up = gate_up.chunk(2, dim=-1)
        return x + self.ffn_down(F.silu(gate) * up)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.project(x, cos, sin)
        return self.finish(x, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


class DemoModel(nn.Module):
    """Token ids to logits; the output matrix is the embedding."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.token_embd = nn.Embedding(size.vocabulary, size.width)
        self.blk = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.output_norm = Norm(size.width, size.norm_epsilon)
        cos, sin = rope_tables(size, size.context)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                last = name.endswith(("attn_output.weight", "ffn_down.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * size.layers) ** 0.5 if last else 0.02)

    def hidden(self, ids: Tensor) -> Tensor:
        """What the output matrix is applied to: (batch, positions, width) for ids (batch, positions)."""
        positions = ids.shape[1]
        x = self.token_embd(ids)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for block in self.blk:
            x = block(x, self.cos[:positions], self.sin[:positions])
        return self.output_norm(x)

    @torch.no_grad()
    def reply(self, prompts: list[list[int]], end: int, max_tokens: int) -> list[list[int]]:
        """Greedy replies to prompts (lists of ids), all decoded together, each up to its `end` token."""
        device, size = self.cos.device, self.size
        width = max(map(len, prompts))
        total = width + max_tokens
        ids = torch.full((len(prompts), width), end, device=device)
        seen = torch.zeros(len(prompts), total, dtype=torch.bool, device=device)
        seen[:, width:] = True
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt, device=device)
            seen[row, width - len(prompt) : width] = True
        shape = (size.layers, len(prompts), size.kv_heads, total, size.head_size)
        keys = torch.zeros(shape, device=device, dtype=self.token_embd.weight.dtype)
        values = torch.zeros_like(keys)
        places = torch.arange(total, device=device)
        replies: list[Tensor] = []
        done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        start = 0
        for _ in range(max_tokens):
            stop = start + ids.shape[1]
            causal = places[None, :stop] <= places[start:stop, None]
            # A row of nothing but padding would be all masked and give NaN, so every place sees itself.
            mask = (causal & seen[:, None, :stop]) | (places[None, :stop] == places[start:stop, None])
            x = self.token_embd(ids)
            for layer, block in enumerate(self.blk):
                q, k, v = block.project(x, self.cos[start:stop], self.sin[start:stop])
                keys[layer, :, :, start:stop], values[layer, :, :, start:stop] = k, v
                attended = F.scaled_dot_product_attention(
                    q, keys[layer, :, :, :stop], values[layer, :, :, :stop], mask[:, None], enable_gqa=True
                )
                x = block.finish(x, attended)
            logits = self.output_norm(x[:, -1]) @ self.token_embd.weight.T
            ids = logits.argmax(-1, keepdim=True)
            replies.append(ids[:, 0])
            done |= ids[:, 0] == end
            start = stop
            if done.all():
                break
        rows = torch.stack(replies, dim=1).tolist()
        return [row[: row.index(end)] if end in row else row for row in rows]
