"""From names to what trains: load the backbone and the task, choose the framing, attach the deltas."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from deltatune.backbones import backbone_id, load_backbone, load_config, load_tokenizer
from deltatune.backbones.catalogue import catalogued
from deltatune.backbones.variants import parted
from deltatune.errors import DeltaError, InvalidValue
from deltatune.injection.attach import attach, detach
from deltatune.injection.compose import Composition
from deltatune.injection.delta import Delta
from deltatune.injection.entries import heads_of
from deltatune.methods.kinds import Method, Spelled
from deltatune.structure.index import index
from deltatune.tasks import Task, TaskData
from deltatune.tasks.framing import Framing, How, framings
from deltatune.tasks.sampling import subset
from deltatune.training.batches import Streamed
from deltatune.training.life import Trained
from deltatune.training.objective import Objective
from deltatune.training.settings import Settings
from deltatune.training.tokens import encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from deltatune.training.trainer import Material

Kind = Literal["encoder", "decoder", "encoder-decoder"]


@dataclass
class Job:
    """A run's objects.

    Attributes:
        name: opens the backbone again; None for a model that does not say where it is from.
        backbone: the model, with the deltas attached.
        tokenizer: its tokenizer.
        data: the task's rows.
        framing: how rows are put to the model.
        deltas: the deltas that train, one a method.
        saved: what is saved: the delta, or the composition of several.
        lr: the peak learning rate.
        size: how many numbers train, counted when the job is made: exporting and pruning leave fewer.
    """

    name: str | None
    backbone: nn.Module
    tokenizer: PreTrainedTokenizerBase
    data: TaskData
    framing: Framing
    deltas: list[Delta]
    saved: Delta | Composition
    lr: float
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.size = sum(one.budget().delta for one in self.trained)

    @property
    def trained(self) -> list[Trained]:
        """The deltas that train, and the composition where it has mixers that do."""
        mixing = [self.saved.mixing] if isinstance(self.saved, Composition) and self.saved.mixers() else []
        return [*self.deltas, *mixing]

    @property
    def trains(self) -> bool:
        """Something of them wants gradients; not of a control."""
        return self.size > 0

    @property
    def metric(self) -> str:
        """The metric that counts."""
        return self.data.task.metric

    def material(self, settings: Settings) -> Material:
        """Encoded training rows, validation rows and the loss."""
        from deltatune.training.trainer import Material

        weights = self.framing.class_weights(self.data.train) if settings.class_weights else None
        objective = Objective(self.framing, weights)
        validation = subset(self.data.task, self.data.validation, settings.eval_rows) if settings.eval_rows else self.data.validation
        if self.data.stream is not None:
            streamed = Streamed(self.framing, self.data.stream, settings.batch_size, settings.seed)
            return Material(self.framing, objective, streamed, validation)
        return Material(self.framing, objective, encoded(self.framing, self.data), validation)

    def dissolve(self) -> None:
        """Detach what was attached."""
        detach(self.saved)


def make_job(
    backbone: str | nn.Module,
    data: TaskData,
    methods: Sequence[Method],
    where: Any,
    layers: Any,
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase | None,
    load: Callable[..., nn.Module] = load_backbone,
) -> Job:
    """Load, frame and attach; a model that was given is as it was if anything fails.

    Args:
        backbone: its name, or the model.
        data: the task's rows.
        methods: one recipe a delta.
        where: sites, as in ``attach``.
        layers: layers, as in ``attach``.
        settings: all knobs.
        tokenizer: of a model that was given; found by the model's name if left out.
        load: what gives a model by its name.

    Raises:
        InvalidValue: labels that do not fit the head, or a tokenizer that cannot be found.
        Unsupported: a framing that neither the task nor the model has.
    """
    torch.manual_seed(settings.seed)
    if isinstance(backbone, str):
        module, tokenizer, framing = load_framed(backbone, data.task, settings, tokenizer, load)
    else:
        module = backbone
        tokenizer = tokenizer or load_tokenizer(_name_of(module))
        framing = choose_framing(data.task, kind_of(module), settings, tokenizer)
        check_module(module, framing, settings)
    torch.manual_seed(settings.seed)  # the patches' weights do not depend on how the backbone came
    saved = attach(module, spelled(methods, tokenizer, framing), where, layers=layers)
    deltas = saved.deltas if isinstance(saved, Composition) else [saved]
    lr = settings.lr if settings.lr is not None else min(method.learning_rate for method in methods)
    return Job(name_of(backbone), module, tokenizer, data, framing, deltas, saved, lr)


def load_framed(
    backbone: str,
    task: Task,
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase | None = None,
    load: Callable[..., nn.Module] = load_backbone,
) -> tuple[nn.Module, PreTrainedTokenizerBase, Framing]:
    """The backbone of that name as the task's framing wants it, with its tokenizer and the framing.

    Raises:
        UnknownName: nobody knows the backbone.
        Unsupported: a framing that neither the task nor the model has.
    """
    tokenizer = tokenizer or load_tokenizer(backbone)
    framing = choose_framing(task, kind_of(backbone), settings, tokenizer)
    options = framing.backbone_options | {"quantize": settings.quantize, "new_head": settings.new_head}
    return load(backbone, auto_class=framing.auto_class, **options), tokenizer, framing


def spelled(methods: Sequence[Method], tokenizer: PreTrainedTokenizerBase, framing: Framing) -> list[Method]:
    """The recipes with token ids in place of words, so that what is saved needs no tokenizer.

    The labels go by their words where the framing has words for them, else by their names.
    """
    verbalizer = framing.template.verbalizer if framing.template is not None else None
    labels = verbalizer.words if verbalizer is not None else framing.task.labels
    return [method.spell(tokenizer, labels) if isinstance(method, Spelled) else method for method in methods]


def attached_job(trained: Delta | Composition, data: TaskData, settings: Settings, tokenizer: PreTrainedTokenizerBase | None) -> Job:
    """The job of training what is attached already.

    Raises:
        InvalidValue: labels that do not fit the head, a tokenizer that cannot be found, or nothing that would train.
        Unsupported: a framing that neither the task nor the model has.
    """
    module = trained.backbone
    tokenizer = tokenizer or load_tokenizer(_name_of(module))
    framing = choose_framing(data.task, kind_of(module), settings, tokenizer)
    check_module(module, framing, settings)
    members = trained.deltas if isinstance(trained, Composition) else [trained]
    job = Job(name_of(module), module, tokenizer, data, framing, [delta for delta in members if delta.trainable], trained, settings.lr or 0)
    if not trained.enabled or not job.trained:
        state = "frozen" if trained.enabled else "disabled"
        raise InvalidValue(f"Nothing of `{trained.name}` would train: it is {state}. Unfreeze or enable it first.")
    if settings.lr is None:
        mixers = trained.mixers().values() if isinstance(trained, Composition) else ()
        job.lr = min(*(delta.method.learning_rate for delta in job.deltas), *(mixer.learning_rate for mixer in mixers), math.inf)
    return job


def choose_framing(task: Task, kind: Kind, settings: Settings, tokenizer: PreTrainedTokenizerBase) -> Framing:
    """The framing that was asked for; left to us, a head for encoders, and for models with a decoder what the task's type prefers.

    Raises:
        Unsupported: the task or the model does not take the framing.
        InvalidValue: a template was asked for with a head.
    """
    name = settings.framing
    if name == "auto":
        worded = kind != "encoder" and task.kind.speaks and (bool(task.templates) or task.kind.head is None)
        name = task.kind.words if worded else "head"
    how = How(settings.max_length, kind, settings.template, settings.manual_template, settings.packing)
    return framings[name].make(task, tokenizer, how)


def kind_of(backbone: str | nn.Module) -> Kind:
    """Encoder, decoder or both, from the catalogue, the configuration, or the class."""
    entry = catalogued(parted(backbone)[0]) if isinstance(backbone, str) else None
    if entry is not None:
        return entry.kind
    config: Any = load_config(backbone) if isinstance(backbone, str) else getattr(backbone, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder"
    names = [type(backbone).__name__] if isinstance(backbone, nn.Module) else list(getattr(config, "architectures", None) or [])
    return "decoder" if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names) else "encoder"


def name_of(backbone: str | nn.Module) -> str | None:
    """The name that opens the backbone again; None for a model that does not say where it is from."""
    if isinstance(backbone, str):
        return backbone_id(backbone)
    try:
        return backbone_id(_path_of(backbone)) if _path_of(backbone) else None
    except DeltaError:  # a folder that is gone
        return None


def _path_of(module: nn.Module) -> str:
    return str(getattr(getattr(module, "config", None), "name_or_path", "") or "")


def _name_of(module: nn.Module) -> str:
    if not _path_of(module):
        raise InvalidValue(f"This {type(module).__name__} does not say where its tokenizer is. Give it: train(..., tokenizer=tokenizer).")
    return _path_of(module)


def check_module(module: nn.Module, framing: Framing, settings: Settings) -> None:
    """The head of a model that was given fits the task.

    Raises:
        InvalidValue: it has another number of outputs, or the settings ask for what a model by name would get.
    """
    if settings.quantize is not None:
        raise InvalidValue(f"`quantize={settings.quantize}` needs a backbone by name, but a model was given. Quantise it yourself.")
    if framing.outputs is None:
        return
    wanted, said, made = framing.outputs, getattr(getattr(module, "config", None), "num_labels", None), _head_size(module)
    if not {said, made} <= {wanted, None}:
        found = f"{said if made is None else made} outputs" + (f", and its config says {said}" if said != made is not None else "")
        raise InvalidValue(
            f"The task `{framing.task.name}` has {wanted} labels, but the head of this {type(module).__name__} has {found}. "
            f"Load it with num_labels={wanted}, or give the backbone by name."
        )


def _head_size(module: nn.Module) -> int | None:
    """Outputs of the last layer of the model's task head; None where none is known."""
    parts = [part for site in heads_of(index(module)) for part in site.module.modules()]
    sizes = [int(part.out_features) for part in parts if isinstance(getattr(part, "out_features", None), int)]  # type: ignore[arg-type]
    return sizes[-1] if sizes else None
