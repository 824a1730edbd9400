"""Each job's dropout is its own, bit for bit, or the forward is not shared."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.errors import Unsupported
from deltatune.methods import IA3, LoRA, PromptTuning
from deltatune.multi.streams import Block, Places, Stream, Streams
from deltatune.multi.together.tenant import Tenant
from tests.models import MODELS
from tests.multi.alone import alone, far, job, still, together
from tests.training import tiny

CPU = torch.device("cpu")


def two() -> tuple[Streams, Places]:
    """Two rows of one job, with 5 tokens, and one of another, with 3."""
    own = torch.arange(5), torch.arange(3)
    return Streams([Block(0, 2, Stream(0, CPU)), Block(2, 3, Stream(1, CPU))]), Places({5: own}, {5: own})


@pytest.mark.parametrize(
    ("shape", "seen", "axes"),
    [
        ((3, 4), (3, 4), ()),
        ((15, 4), (3, 5, 4), (1,)),
        ((3, 5, 4), (3, 5, 4), (1,)),
        ((6, 5, 4), (3, 2, 5, 4), (2,)),
        ((3, 1, 4), (3, 1, 4), ()),
        ((3, 2, 5, 5), (3, 2, 5, 5), (2, 3)),
    ],
    ids=str,
)
def test_noise_is_that_of_each_job_by_itself(shape: tuple[int, ...], seen: tuple[int, ...], axes: tuple[int, ...]) -> None:
    streams, places = two()
    with streams.running(places):
        found = F.dropout(torch.ones(shape), 0.5).view(seen)
    for seed, rows, tokens in ((0, slice(0, 2), 5), (1, slice(2, 3), 3)):
        own = found[rows]
        for axis in axes:
            own = own.narrow(axis, 0, tokens)
        torch.manual_seed(seed)
        assert torch.equal(own, F.dropout(torch.ones(own.shape), 0.5))


@pytest.mark.parametrize("shape", [(3,), (1, 5, 4), (6, 4), (4, 5, 4), (3, 7, 4), (3, 2, 5, 6), (3, 1, 1, 1, 5)], ids=str)
def test_what_nobody_can_place_is_refused(shape: tuple[int, ...]) -> None:
    streams, places = two()
    with pytest.raises(Unsupported, match=r"`tokens=0`"), streams.running(places):
        F.dropout(torch.ones(shape), 0.5)


DRAWS: dict[str, Callable[[Tensor], Any]] = {
    "attention of PyTorch": lambda x: nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)(x, x, x),
    "recurrent": lambda x: nn.LSTM(4, 4, num_layers=2, dropout=0.5, batch_first=True)(x),
    "a layer that is skipped": lambda x: torch.rand([]),
    "python's": lambda x: random.random(),
    "numpy's": lambda x: numpy.random.uniform(),
    "in place": lambda x: torch.empty(3).bernoulli_(0.5),
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_that_do_not_come_by_are_seen(name: str) -> None:
    x, (streams, places) = torch.randn(3, 5, 4), two()
    state = [block.stream.held["cpu"].clone() for block in streams.blocks]
    with pytest.raises(Unsupported, match="all rows of a batch at once"), streams.running(places):
        DRAWS[name](F.dropout(x, 0.5))
    assert all(torch.equal(block.stream.held["cpu"], before) for block, before in zip(streams.blocks, state, strict=True))


@pytest.mark.parametrize("boolean", [True, False])
def test_a_query_that_sees_nothing_gets_nothing(boolean: bool) -> None:
    mask = torch.zeros(1, 1, 5, 5, dtype=torch.bool)
    mask[..., 1:, :] = True
    given = mask if boolean else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    q = torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    streams, places = two()
    with streams.running(places):
        found = F.scaled_dot_product_attention(q, q, q, attn_mask=given, dropout_p=1e-9)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, q, q, attn_mask=given))
    [gradient] = torch.autograd.grad(found.square().sum(), q)
    assert gradient.isfinite().all() and not found[..., 0, :].any()


def dropping(name: str, **settings: float) -> Any:
    """A tiny model with these settings, in its config and modules, beside the dropout it has."""
    model: Any = tiny.backbone(name)
    for owner in (model.config, *model.modules()):
        for setting, value in settings.items():
            if isinstance(getattr(owner, setting, None), float | int):
                setattr(owner, setting, value)
    return model


def differing(model: Any, jobs: list[Any]) -> tuple[float, list[str | None]]:
    outcomes = together(model, jobs)
    assert [outcome.error for outcome in outcomes] == [None] * len(jobs)
    return max(far(outcome.result, alone(model, one)) for outcome, one in zip(outcomes, jobs, strict=True)), [one.apart for one in outcomes]


def test_what_is_dropped_for_all_rows_at_once_is_not_shared() -> None:
    """DeBERTa's table of positions."""
    model = tiny.backbone("deberta_v2")
    found, aparts = differing(model, [job(LoRA(rank=2), where="attention.value", max_steps=3, seed=seed) for seed in range(2)])
    assert found < 1e-5 and all(apart is not None and "once for all rows" in apart for apart in aparts)


def test_layers_that_are_skipped_at_random_are_not_shared() -> None:
    model = dropping("bart", layerdrop=0.3, encoder_layerdrop=0.3, decoder_layerdrop=0.3)
    found, _ = differing(model, [job(LoRA(rank=2), max_steps=4, seed=seed, evaluations=0) for seed in range(2)])
    assert found < 1e-5


@pytest.mark.parametrize("drops", [True, False])
def test_what_is_drawn_only_now_and_then_is_seen(drops: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """In the third step, by a hook of somebody's; the jobs share the first two, and go on alone."""
    model, calls = dropping("bert") if drops else still("bert"), count()

    def now_and_then(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        return y * (0.5 + torch.rand([])) if module.training and next(calls) == 2 else y

    model.bert.embeddings.word_embeddings.register_forward_hook(now_and_then)
    jobs = [job(LoRA(rank=2), max_steps=4, seed=seed) for seed in range(2)]
    assert [outcome.error for outcome in together(model, jobs, progress="lines")] == [None, None]
    assert "go on one by one" in capsys.readouterr().err


def test_rows_with_more_hidden_tokens_than_others_stay_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama's attention drops, and queries of tokens that only fill up see nothing."""
    own: list[int] = []
    whole = Tenant.alone
    monkeypatch.setattr(Tenant, "alone", lambda self, batches: own.append(1) or whole(self, batches))
    model = dropping("llama", attention_dropout=0.1)
    kinds = [PromptTuning(4, init="random"), PromptTuning(1, init="random"), LoRA(rank=2)]
    found, _ = differing(model, [job(kind, max_steps=4, seed=seed) for seed, kind in enumerate(kinds)])
    assert found < 1e-5 and not own


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(name for name in MODELS if name not in ("vit", "torch_encoder", "conv_net", "mlp", "tied_mlp")))
def test_every_architecture_drops_by_job_or_shares_nothing(name: str) -> None:
    model = dropping(name, attention_dropout=0.1, attn_pdrop=0.1, resid_pdrop=0.1, embd_pdrop=0.1, hidden_dropout=0.1)
    jobs = [
        job(LoRA(rank=2, dropout=0.1), where=None if name != "deberta_v2" else "attention.value", max_steps=3),
        job(IA3(), where=None if name != "deberta_v2" else "attention.value", max_steps=3, seed=1, batch_size=3),
        job(LoRA(rank=2), where=None if name != "deberta_v2" else "attention.value", max_steps=2, seed=2, batch_size=2),
    ]
    found, _ = differing(model, jobs)
    assert found < 1e-5
