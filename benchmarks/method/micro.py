"""A trained micro Llama: bytes as tokens, trained on presidential messages in three minutes.

python benchmarks/method/micro.py trains it and prints its held-out bits per byte.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tasks import sotu, sotu_documents

from coatrt.data.documents import batches
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.modules import load_model
from coatrt.models.tokenizer import load_tokenizer
from coatrt.system.disk import cache_directory
from coatrt.system.files import atomic_directory

__all__ = ["MicroOptions", "micro_llama"]


@dataclass(frozen=True)
class MicroOptions:
    """Shape and training of the model.

    Args:
        hidden: width.
        inner: width of the MLP.
        layers: decoder layers.
        heads: attention heads.
        kv_heads: heads of keys and values.
        steps: optimizer steps.
        batch: blocks per step.
        length: bytes per block.
        rate: peak learning rate.
        seed: seed of initial values and batches.
    """

    hidden: int = 128
    inner: int = 384
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    steps: int = 1500
    batch: int = 8
    length: int = 128
    rate: float = 4e-3
    seed: int = 0


def byte_tokenizer() -> Any:
    """Return a tokenizer with one token per byte and 256 as the end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def micro_llama(options: MicroOptions | None = None) -> Path:
    """Return the Hugging Face directory of the trained model, trained once and cached.

    Initial values, batches and the order of sums (one thread) are fixed, so a machine gives one model per seed.
    """
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    options = options or MicroOptions()
    documents, _ = sotu_documents()
    facts = json.dumps([asdict(options), hashlib.sha256("\0".join(documents).encode()).hexdigest(), 1])
    target = cache_directory() / "micro" / hashlib.sha256(facts.encode()).hexdigest()[:16]
    if (target / "config.json").is_file():
        return target
    tokenizer = byte_tokenizer()
    blocks = sotu(tokenizer, options.length).train.tokens
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=272,
                hidden_size=options.hidden,
                intermediate_size=options.inner,
                num_hidden_layers=options.layers,
                num_attention_heads=options.heads,
                num_key_value_heads=options.kv_heads,
                max_position_embeddings=1024,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=256,
            )
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, total_steps=options.steps, pct_start=0.1)
    for step in range(options.steps):
        rows = blocks[batches(len(blocks), options.batch, step, options.seed)]
        model(input_ids=rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    torch.set_num_threads(threads)
    with atomic_directory(target) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return target


def main() -> None:
    """Train the model and print its held-out bits per byte."""
    directory = micro_llama()
    model, data = load_model(Checkpoint.open(directory)), sotu(load_tokenizer(directory))
    blocks = data.held_out.tokens[:: max(1, len(data.held_out) // 256)]
    with torch.no_grad():
        losses = [model(input_ids=rows, labels=rows).loss.item() * len(rows) for rows in blocks.split(32)]
    print(
        f"{directory}: {sum(losses) / len(blocks) / math.log(2):.3f} bits per byte over {blocks.numel()} held-out bytes"
    )


if __name__ == "__main__":
    main()
