"""Names and stored sizes of the tensors of well-known models, computed from their published shapes."""

from __future__ import annotations

from redshard.loader.gguf.quant_types import QuantType


def transformer_tensors(
    n_layers: int,
    width: int,
    kv_width: int,
    hidden: int,
    n_vocab: int,
    quant: QuantType,
    output: QuantType | None,
    biases: bool,
) -> list[tuple[str, int]]:
    """(name, bytes) of every tensor; norms and biases are F32, `output` None means tied embeddings."""
    tensors = [
        ("token_embd.weight", quant.nbytes((n_vocab, width))),
        ("output_norm.weight", 4 * width),
    ]
    if output is not None:
        tensors.append(("output.weight", output.nbytes((n_vocab, width))))
    matrices = {
        "attn_q": (width, width),
        "attn_k": (kv_width, width),
        "attn_v": (kv_width, width),
        "attn_output": (width, width),
        "ffn_gate": (hidden, width),
        "ffn_up": (hidden, width),
        "ffn_down": (width, hidden),
    }
    vectors = {"attn_norm.weight": width, "ffn_norm.weight": width}
    if biases:
        vectors |= {"attn_q.bias": width, "attn_k.bias": kv_width, "attn_v.bias": kv_width}
    for layer in range(n_layers):
        tensors += [(f"blk.{layer}.{name}.weight", quant.nbytes(shape)) for name, shape in matrices.items()]
        tensors += [(f"blk.{layer}.{name}", 4 * length) for name, length in vectors.items()]
    return tensors


def llama_3_8b_q4_k() -> list[tuple[str, int]]:
    """32 layers, 4096 wide, 8 key/value heads of 128, Q4_K with a Q6_K output matrix: 291 tensors."""
    return transformer_tensors(32, 4096, 1024, 14336, 128256, QuantType.Q4_K, QuantType.Q6_K, biases=False)


def qwen_2_5_0_5b_q8_0() -> list[tuple[str, int]]:
    """24 layers, 896 wide, 2 key/value heads of 64, Q8_0, tied embeddings, biases: 290 tensors."""
    return transformer_tensors(24, 896, 128, 4864, 151936, QuantType.Q8_0, None, biases=True)
