"""Writes trained weights as GGUF files: one in F16, and the one that ships, in Q8_0.

    python -m demo_model.export --weights runs/demo --f16 runs/demo/demo-f16.gguf --q8 loader/models/demo.gguf

Tensor names and metadata keys follow https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gguf
import numpy as np
from demo_model.size import SHIPPED
from demo_model.tokens import CHAT_TEMPLATE, END_OF_TEXT, SPECIAL_TOKENS, TURN_END, load_tokenizer
from demo_model.weights import load_weights
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType


def _add_tokenizer(writer: GGUFWriter) -> None:
    tokenizer = load_tokenizer()
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if t in SPECIAL_TOKENS else TokenType.NORMAL for t in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokens.index(END_OF_TEXT))
    writer.add_add_bos_token(False)
    writer.add_eos_token_id(tokens.index(TURN_END))
    writer.add_eot_token_id(tokens.index(TURN_END))
    writer.add_pad_token_id(tokens.index(END_OF_TEXT))
    writer.add_chat_template(CHAT_TEMPLATE)


def write_gguf(weights: dict[str, np.ndarray], path: Path, file_type: LlamaFileType) -> None:
    """Writes the model; matrices in the type of `file_type`, norms in F32."""
    matrix_type = {
        LlamaFileType.MOSTLY_F16: GGMLQuantizationType.F16,
        LlamaFileType.MOSTLY_Q8_0: GGMLQuantizationType.Q8_0,
    }[file_type]
    size = SHIPPED
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, "qwen3")
    writer.add_name("Redshard demo")
    writer.add_description("A small chat model for demonstration, trained from scratch on generated text")
    writer.add_license("apache-2.0")
    writer.add_file_type(file_type)
    writer.add_context_length(size.context)
    writer.add_embedding_length(size.width)
    writer.add_block_count(size.layers)
    writer.add_feed_forward_length(size.feed_forward)
    writer.add_head_count(size.heads)
    writer.add_head_count_kv(size.kv_heads)
    writer.add_key_length(size.head_size)
    writer.add_value_length(size.head_size)
    writer.add_rope_freq_base(size.rope_base)
    writer.add_layer_norm_rms_eps(size.norm_epsilon)
    writer.add_vocab_size(size.vocabulary)
    _add_tokenizer(writer)
    for name, weight in weights.items():
        if weight.ndim == 1:
            writer.add_tensor(name, weight.astype(np.float32))
        else:
            data = gguf.quants.quantize(weight.astype(np.float32), matrix_type)
            writer.add_tensor(name, data, raw_dtype=matrix_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, required=True, help="directory that training wrote")
    parser.add_argument("--f16", type=Path, required=True, help="the F16 file to write")
    parser.add_argument("--q8", type=Path, required=True, help="the Q8_0 file to write")
    arguments = parser.parse_args()
    weights = load_weights(arguments.weights)
    for path, file_type in (
        (arguments.f16, LlamaFileType.MOSTLY_F16),
        (arguments.q8, LlamaFileType.MOSTLY_Q8_0),
    ):
        write_gguf(weights, path, file_type)
        print(f"{path}: {path.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
