"""Times AdapterHub's ``BatchSplit`` for ``many_adapters.py``; runs in an environment of its own, because it pins an older transformers.

Reads the name of what to time from each line of its input, answers with seconds. ``plain ROWS`` is the backbone without adapters; ``split
KIND`` is eight adapters of that kind with four rows each, ``alone KIND`` one adapter with four rows.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import adapters
import torch
from adapters import composition
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

torch.set_num_threads(int(sys.argv[1]))
WIDTH, FEED_FORWARD, LAYERS = (int(number) for number in sys.argv[2:5])
DELTAS, EACH, CACHED = 8, 4, 64
KINDS: dict[str, Any] = {
    "lora": adapters.LoRAConfig(r=8, alpha=16, selfattn_lora=True, intermediate_lora=True, output_lora=True, attn_matrices=["q", "k", "v"]),
    "ia3": adapters.IA3Config(),
    "houlsby": adapters.DoubleSeqBnConfig(),
    "pfeiffer": adapters.SeqBnConfig(),
    "parallel": adapters.ParBnConfig(),
    "compacter": adapters.CompacterConfig(),
    "prefix": adapters.PrefixTuningConfig(flat=True, prefix_length=10),
}


def backbone() -> LlamaForCausalLM:
    shape = dict(hidden_size=WIDTH, intermediate_size=FEED_FORWARD, num_hidden_layers=LAYERS, num_attention_heads=max(WIDTH // 64, 1))
    return LlamaForCausalLM(LlamaConfig(vocab_size=4000, max_position_embeddings=256, **shape)).eval()


def cached(model: Any, rows: int) -> Callable[[], Any]:
    """A decode step: one token a row behind the cached ones."""
    cache = DynamicCache()
    model(input_ids=torch.zeros(rows, CACHED, dtype=torch.long), past_key_values=cache, use_cache=True)
    ids = torch.ones(rows, 1, dtype=torch.long)

    def step() -> None:
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


def made(what: str, of: str) -> Callable[[], Any]:
    """The step that a line asks for."""
    model = backbone()
    if what == "plain":
        return cached(model, int(of))
    adapters.init(model)
    names = [f"{of}{k}" for k in range(DELTAS if what == "split" else 1)]
    for name in names:
        model.add_adapter(name, config=KINDS[of])
    split = composition.BatchSplit(*names, batch_sizes=[EACH] * DELTAS) if what == "split" else names[0]
    model.active_adapters = split
    return cached(model, EACH * len(names))


@torch.no_grad()
def serve() -> None:
    """Answer every line."""
    steps: dict[str, Callable[[], Any]] = {}
    for line in sys.stdin:
        name = line.strip()
        try:
            if name not in steps:
                steps[name] = made(*name.split())
            steps[name]()
            began = time.perf_counter()
            steps[name]()
            print(time.perf_counter() - began, flush=True)
        except Exception as error:  # a kind it cannot split is part of what is found
            print(f"cannot: {type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}", flush=True)


serve()  # a script only: nobody imports it
