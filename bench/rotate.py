#!/usr/bin/env python3
"""The same Llama with longer rows: for types and tools that want rows of a multiple of 256 weights.

    bench/rotate.py build/bench/quality/base-hf -o build/bench/rotated-hf

SmolLM2-135M has rows of 576. The result computes the same function with rows of 768 and 1536, all weights dense:

- hidden states are rotated into more dimensions by a random matrix with orthonormal columns, as SliceGPT and QuaRot
  rotate them; what a norm multiplies by goes into the matrices behind it, so that the output matrix differs from the
  embeddings;
- there are more heads, copies of the last ones, and the output of each copy counts by its part.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from command import exit_status
from tritcore.console import out
from tritcore.errors import TritError

_READ = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
_KEY_HEADS = ("self_attn.k_proj", "self_attn.v_proj")
_NORM_BEFORE = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}


def rotate(
    weights: dict[str, torch.Tensor], config: dict, hidden: int, groups: int, seed: int
) -> dict[str, torch.Tensor]:
    """The weights of the larger model.

    Args:
        weights: of a Llama without biases, by their names in the checkpoint.
        config: its config.json; the new sizes are set in it.
        hidden: the new size of the hidden states.
        groups: the new number of heads for keys and values; those of queries grow with it.
        seed: of the rotation.

    Returns:
        float16 tensors.
    """
    old_hidden, old_groups = config["hidden_size"], config["num_key_value_heads"]
    per_group = config["num_attention_heads"] // old_groups
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(hidden, old_hidden, generator=generator, dtype=torch.float64))
    # copies of the last groups; whatever has n copies counts one n-th
    source = [min(group, old_groups - 1) for group in range(groups)]
    share = torch.tensor([1 / source.count(group) for group in source], dtype=torch.float64)

    def heads(matrix: torch.Tensor, per_group: int) -> torch.Tensor:
        """Rows of heads, with the copies."""
        return matrix.view(old_groups, per_group * config["head_dim"], -1)[source].flatten(0, 1)

    wide = {name: tensor.double() for name, tensor in weights.items()}
    output = wide.get("lm_head.weight", wide["model.embed_tokens.weight"])
    made = {
        "model.embed_tokens.weight": wide["model.embed_tokens.weight"] @ rotation.T,
        "lm_head.weight": output * wide["model.norm.weight"] @ rotation.T,
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name in _READ:
            matrix = wide[f"{prefix}{name}.weight"] * wide[f"{prefix}{_NORM_BEFORE[name.split('.')[0]]}.weight"]
            if name.startswith("self_attn"):
                matrix = heads(matrix, 1 if name in _KEY_HEADS else per_group)
            made[f"{prefix}{name}.weight"] = matrix @ rotation.T
        attention = heads(wide[f"{prefix}self_attn.o_proj.weight"].T, per_group)
        attention = attention * share.repeat_interleave(per_group * config["head_dim"])[:, None]
        made[f"{prefix}self_attn.o_proj.weight"] = rotation @ attention.T
        made[f"{prefix}mlp.down_proj.weight"] = rotation @ wide[f"{prefix}mlp.down_proj.weight"]
    # The mean square of a hidden state is less by this, since its length is the same.
    shrunk = old_hidden / hidden
    norm = torch.full((hidden,), shrunk**0.5, dtype=torch.float64)
    made |= {name: norm.clone() for name in weights if name.endswith("norm.weight")}
    config |= {
        "hidden_size": hidden,
        "num_key_value_heads": groups,
        "num_attention_heads": groups * per_group,
        "rms_norm_eps": config["rms_norm_eps"] * shrunk,
        "tie_word_embeddings": False,
    }
    return {name: tensor.to(torch.float16).contiguous() for name, tensor in made.items()}


def make(options: argparse.Namespace) -> None:
    """Write the checkpoint. Raises TritError."""
    source: Path = options.checkpoint
    try:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        weights = load_file(source / "model.safetensors")
        others = shutil.ignore_patterns("model.safetensors", "config.json")
        shutil.copytree(source, options.output, dirs_exist_ok=True, ignore=others)
        made = rotate(weights, config, options.hidden, options.groups, options.seed)
        save_file(made, options.output / "model.safetensors", metadata={"format": "pt"})
        (options.output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except (OSError, ValueError, KeyError) as error:
        raise TritError(f"{source} cannot be made larger: {error}") from error
    out.print(options.output, soft_wrap=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a folder with a Llama in one file")
    parser.add_argument("--hidden", type=int, default=768, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--groups", type=int, default=4, metavar="N", help="heads for keys (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the rotation (default: %(default)s)")
    parser.add_argument("--output", "-o", type=Path, metavar="FOLDER", required=True)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    chosen = parse(None)
    sys.exit(exit_status(lambda: make(chosen)))
