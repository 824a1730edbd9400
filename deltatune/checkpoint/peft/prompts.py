"""PROMPT_TUNING and P_TUNING: virtual tokens ahead of the text, stored as what they are, not as what makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltatune.checkpoint.foreign import Part
from deltatune.checkpoint.peft.config import task_of
from deltatune.checkpoint.peft.keys import ROOT, Modules
from deltatune.checkpoint.peft.tuner import Content, Output, Tuner, cannot, tuners
from deltatune.errors import CheckpointError, Unsupported
from deltatune.injection.delta import Delta
from deltatune.methods.addition.embedding_prefix_tuning import EmbeddingPrefixTuning
from deltatune.methods.addition.p_tuning import PTuning
from deltatune.methods.addition.prompt_tuning import Init, PromptTuning
from deltatune.methods.kinds import Method, PromptPatch
from deltatune.structure.index import Stack
from deltatune.structure.rows import heads_of

STORED = "prompt_embeddings"

SIZES: Mapping[str, Any] = {
    "modules_to_save": None,
    "num_attention_heads": None,
    "num_layers": None,
    "num_transformer_submodules": None,
    "num_virtual_tokens": None,
    "token_dim": None,
}
"""Fields of every soft prompt."""


class Prompts(Tuner):
    """PROMPT_TUNING."""

    methods = (PromptTuning, EmbeddingPrefixTuning)
    prefix = ROOT
    fields: ClassVar[Mapping[str, Any]] = {
        **SIZES,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    }
    targeted = False

    def read(self, content: Content) -> list[Part]:
        """P at the text stack."""
        start = content.fields.take("prompt_tuning_init", "RANDOM", str)
        for key in ("prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path"):
            content.fields.data.pop(key, None)
        stack, P = read_rows(content)
        begun: Init = "random" if start == "RANDOM" else "vocabulary"
        method = PromptTuning(num_virtual_tokens=len(P), init=begun, seen_by_decoder=bool(stack.side))
        return [Part("prompt", method, {(stack.site.key, "P"): P})]

    def write(self, deltas: Sequence[Delta], output: Output) -> None:
        """P."""
        write_rows(deltas, output)


class MadePrompts(Tuner):
    """P_TUNING; what makes P is not stored."""

    methods = (PTuning,)
    prefix = ROOT
    fields: ClassVar[Mapping[str, Any]] = {
        **SIZES,
        "encoder_dropout": 0.0,
        "encoder_hidden_size": None,
        "encoder_num_layers": 2,
        "encoder_reparameterization_type": "MLP",
    }
    targeted = False

    def read(self, content: Content) -> list[Part]:
        """P at the text stack, in the final form."""
        for key in ("encoder_dropout", "encoder_reparameterization_type"):
            content.fields.data.pop(key, None)  # of what made P, which is gone
        width, layers = content.fields.take("encoder_hidden_size", None, int), content.fields.take("encoder_num_layers", 2)
        stack, P = read_rows(content)
        method = PTuning(num_virtual_tokens=len(P), hidden_dim=width, num_layers=layers, seen_by_decoder=bool(stack.side))
        return [Part("prompt", method, {(stack.site.key, "P"): P}, exported=True)]

    def write(self, deltas: Sequence[Delta], output: Output) -> None:
        """P, made for the last time if need be."""
        method: Method = write_rows(deltas, output)
        assert isinstance(method, PTuning)
        output.config |= {
            "encoder_hidden_size": method.hidden_dim or output.config["token_dim"] // 2,
            "encoder_num_layers": method.num_layers,
            "encoder_reparameterization_type": "LSTM",
        }


def read_rows(content: Content) -> tuple[Stack, Tensor]:
    """The text stack, and P: (num_virtual_tokens, hidden). For encoder-decoders PEFT stores as many rows again, which it never reads.

    Raises:
        CheckpointError: it is missing, or of another size than the config says.
    """
    stack = text_stack(content.modules)
    P, length = read_stored(content)
    if P.ndim != 2 or len(P) not in ((length, 2 * length) if stack.side else (length,)):
        raise CheckpointError(f"`{content.stored.file}` holds {tuple(P.shape)} for {length} virtual tokens. Copy or save it again.")
    return stack, P[:length].clone()


def read_stored(content: Content) -> tuple[Tensor, int]:
    """What PEFT stores of any soft prompt, and how many virtual tokens it is for."""
    stored = content.stored.take_shared(STORED)
    length = content.fields.take("num_virtual_tokens", 0)
    if stored is None or length < 1:
        raise CheckpointError(f"`{content.stored.file}` lacks `{STORED}`, or its config the number of virtual tokens. Copy it again.")
    for key in ("num_attention_heads", "num_layers", "num_transformer_submodules", "token_dim"):
        content.fields.data.pop(key, None)  # the backbone says these, and the shape must fit
    return stored, length


def text_stack(modules: Modules) -> Stack:
    """The stack whose embeddings PEFT puts prompts ahead of: of an encoder-decoder the encoder.

    Raises:
        Unsupported: there is none, or there are several, or PEFT cannot run prompts there or reads other positions.
    """
    stacks, kind = [stack for stack in modules.sites.stacks if stack.side != "decoder"], type(modules.backbone).__name__
    if any(stack.side for stack in stacks) and task_of(modules.backbone, set()) not in ("SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"):
        raise Unsupported(
            f"A soft prompt of PEFT's for {kind} is none of ours: PEFT cannot run it, because that model makes its decoder's ids from the "
            "text's. Use LoRA, which is the same in both, or the native format."
        )
    attention = stacks[0].attentions[0].module if stacks and stacks[0].attentions else None
    if kind.endswith("ForSequenceClassification") and not getattr(attention, "is_causal", False):
        raise Unsupported(
            f"A soft prompt of PEFT's for {kind} is none of ours: there the classifier reads the first virtual token, and here the text's "
            "first one. Use LoRA, which is the same in both, or the native format."
        )
    if len(stacks) != 1:
        raise Unsupported(f"{kind} has {len(stacks)} text stacks, and PEFT's soft prompts are for one. Use LoRA, or the native format.")
    return stacks[0]


def write_rows(deltas: Sequence[Delta], output: Output) -> Any:
    """Store P, set the sizes, and return the method.

    Raises:
        Unsupported: it does not sit at PEFT's stack alone.
    """
    if len(deltas) > 1:
        raise cannot(deltas[1], "it has one soft prompt in a folder")
    delta, stack = deltas[0], text_stack(output.modules)
    patches = [(entry.site.key, entry.patch) for entry in delta.entries if not entry.head]
    if len(patches) != 1 or patches[0][0] != stack.site.key or not isinstance(patches[0][1], PromptPatch):
        raise cannot(delta, f"PEFT's soft prompts are at `{stack.site.key or '(the backbone)'}` alone")
    if stack.side and not patches[0][1].seen_by_decoder:
        raise cannot(delta, "in PEFT the decoder attends to the encoder's outputs at virtual tokens, which takes seen_by_decoder=True here")
    with torch.no_grad():
        P = patches[0][1]().detach()
    doubled = task_of(output.modules.backbone, set()) == "SEQ_2_SEQ_LM"
    output.tensors[STORED] = torch.cat([P, torch.zeros_like(P)]) if doubled else P
    attention = heads_of(stack.attentions[0].module) if stack.attentions else None
    output.config |= {
        "num_virtual_tokens": len(P),
        "token_dim": P.shape[1],
        "num_layers": stack.layers,
        "num_attention_heads": attention.query if attention else 1,
        "num_transformer_submodules": 2 if doubled else 1,
    }
    return delta.method


tuners.register("PROMPT_TUNING")(Prompts())
tuners.register("P_TUNING")(MadePrompts())
