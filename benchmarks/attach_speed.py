"""Is attaching LoRA to all linears of SmolLM2-135M faster than ``peft.get_peft_model``?

The backbone has SmolLM2-135M's shapes and random weights: attaching does not look at their values.
"""

from __future__ import annotations

import peft
import torch
from paired import interleave, ratio, report, timed
from transformers import LlamaConfig, LlamaForCausalLM

import deltatune as dt
from deltatune.methods import LoRA

ROUNDS, RANK = 7, 8
LINEARS = ["attention.{query,key,value,output}", "feed_forward.{gate,up,down}"]


def smollm2() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def ours(backbone: LlamaForCausalLM) -> float:
    delta: list[dt.Delta] = []
    seconds = timed(lambda: delta.append(dt.attach(backbone, LoRA(rank=RANK), LINEARS)))
    assert delta[0].budget().delta == 2442240, delta[0].budget()
    dt.detach(delta[0])
    return seconds


def theirs(backbone: LlamaForCausalLM) -> float:
    models: list[peft.PeftModel] = []
    config = peft.LoraConfig(r=RANK, target_modules="all-linear")
    seconds = timed(lambda: models.append(peft.get_peft_model(backbone, config)))
    assert models[0].get_nb_trainable_parameters()[0] == 2442240
    models[0].unload()
    return seconds


if __name__ == "__main__":
    torch.manual_seed(0)
    backbone, other = smollm2(), smollm2()
    found = interleave({"deltatune": lambda: ours(backbone), "peft": lambda: theirs(other)}, ROUNDS)
    against = ratio(found["deltatune"], found["peft"])
    report(
        "attach LoRA to the 210 linears of SmolLM2-135M: deltatune / peft.get_peft_model, seconds",
        ratio=round(against, 3),
        deltatune_seconds=round(sorted(found["deltatune"])[ROUNDS // 2], 4),
        peft_seconds=round(sorted(found["peft"])[ROUNDS // 2], 4),
        bar=1.0,
        holds=against < 1,
    )
