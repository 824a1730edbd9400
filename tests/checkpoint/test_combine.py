"""Arithmetic on deltas: every scheme against its formula written out, PEFT where it is right, and errors for what cannot be added."""

from __future__ import annotations

import warnings
import zlib
from itertools import product
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.checkpoint.combine import By
from deltatune.errors import InvalidValue, UnknownName, Unsupported
from deltatune.methods import IA3, BitFit, FISHMask, LinearProbe, LoRA, LoRAPlus, PromptTuning
from deltatune.methods.kinds import Exported, Method, methods
from tests.checkpoint.deltas import backbone, same, small, state, train
from tests.models import output

WEIGHTS = (0.7, -0.4)


def mlp() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def pair(model: nn.Module, *recipes: Method, where: Any = ("0", "2"), spread: float = 0.3, **options: Any) -> list[dt.Delta]:
    """Trained deltas called a, b, ..."""
    deltas = []
    for k, recipe in enumerate(recipes):
        torch.manual_seed(k)
        delta = dt.attach(model, recipe, where=list(where) if where else None, name="abc"[k], **options)
        with torch.no_grad():
            for parameter in delta.trained_parameters().values():
                parameter.add_(spread * torch.randn(parameter.shape))
        deltas.append(delta)
    return deltas


def change(delta: dt.Delta, key: str) -> Tensor:
    """s B A of a LoRA, in float64."""
    patch = next(entry.patch for entry in delta.entries if entry.key == key)
    tensors = delta.state_dict()
    scale = cast("Any", patch).scale
    return scale * tensors[f"{key}.lora_B"].double() @ tensors[f"{key}.lora_A"].double()


def nearest(matrix: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


def trimmed(taus: list[dict[str, Tensor]], density: float) -> list[dict[str, Tensor]]:
    found = []
    for tau in taus:
        flat = torch.cat([tensor.abs().flatten() for tensor in tau.values()]).sort(descending=True).values
        least = flat[max(1, int(density * len(flat))) - 1]
        found.append({key: tensor * (tensor.abs() >= least) for key, tensor in tau.items()})
    return found


def by_hand(scheme: str, taus: list[dict[str, Tensor]], density: float, seed: int) -> dict[str, Tensor]:
    """The table in ``combine``'s docstring, entry by entry."""
    found: dict[str, Tensor] = {}
    elected = trimmed(taus, density)
    for key in taus[0]:
        if scheme == "ties":
            total = torch.zeros_like(taus[0][key])
            for place in product(*map(range, total.shape)):
                values = [tau[key][place] for tau in elected]
                sign = 1.0 if sum(values) >= 0 else -1.0
                agreeing = [w * value for w, value in zip(WEIGHTS, values, strict=True) if value.sign() == sign]
                total[place] = sum(agreeing) / len(agreeing) if agreeing else 0.0
            found[key] = total
        elif scheme == "dare":
            parts = []
            for k, tau in enumerate(taus):
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{k}/{key}".encode()))
                mask = torch.rand(tau[key].shape, generator=generator, dtype=torch.float64) < density
                parts.append(WEIGHTS[k] * mask * tau[key] / density)
            found[key] = parts[0] + parts[1]
        else:
            found[key] = WEIGHTS[0] * taus[0][key] + WEIGHTS[1] * taus[1][key]
    return found


@pytest.mark.parametrize("scheme", ["linear", "task_arithmetic", "cat", "svd", "ties", "dare"])
@pytest.mark.parametrize("ranks", [(2, 2), (1, 3)])
def test_low_rank_changes(scheme: By, ranks: tuple[int, int]) -> None:
    a, b = pair(mlp(), LoRA(rank=ranks[0], alpha=3), LoRA(rank=ranks[1], alpha=5, rank_stabilized=True))
    taus = [{key: change(delta, key) for key in ("0", "2")} for delta in (a, b)]
    combined = dt.combine({a: WEIGHTS[0], b: WEIGHTS[1]}, scheme, name="c", density=0.4, seed=7)
    rank = sum(ranks) if scheme in ("linear", "task_arithmetic", "cat") else max(ranks)
    assert cast("LoRA", combined.method).rank == rank
    for key, tau in by_hand(scheme, taus, 0.4, 7).items():
        expected = tau if scheme in ("linear", "task_arithmetic", "cat") else nearest(tau, rank)
        torch.testing.assert_close(change(combined, key), expected, atol=1e-6, rtol=1e-5)


def test_cat_concatenates() -> None:
    a, b = pair(mlp(), LoRA(rank=2), LoRA(rank=1))
    combined = dt.combine({a: 0.7, b: 0.3}, "cat", name="c")
    torch.testing.assert_close(
        combined.state_dict()["0.lora_A"], torch.cat([a.state_dict()["0.lora_A"], b.state_dict()["0.lora_A"]]), atol=0, rtol=0
    )


@pytest.mark.parametrize("scheme", ["linear", "task_arithmetic", "svd", "ties", "dare"])
def test_a_smaller_and_a_larger_rank(scheme: By) -> None:
    a, b = pair(mlp(), LoRA(rank=2), LoRA(rank=2))
    tau = by_hand(scheme, [{key: change(delta, key) for key in ("0", "2")} for delta in (a, b)], 0.5, 0)
    for rank in (1, 7):
        combined = dt.combine(dict(zip((a, b), WEIGHTS, strict=True)), scheme, name=f"c{rank}", rank=rank, density=0.5, enable=False)
        torch.testing.assert_close(change(combined, "0"), nearest(tau["0"], rank), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("scheme", ["linear", "task_arithmetic", "ties", "dare"])
def test_selections(scheme: By) -> None:
    model = mlp()
    before = state(model)
    a, b = pair(model, BitFit(), BitFit())
    keys = sorted(a.state_dict())
    taus = [{key: delta.state_dict()[key].double() - before[key].double() for key in keys} for delta in (a, b)]
    dt.combine({a: WEIGHTS[0], b: WEIGHTS[1]}, scheme, name="c", density=0.5, seed=3)
    for key, tau in by_hand(scheme, taus, 0.5, 3).items():
        torch.testing.assert_close(model.get_parameter(key).double(), before[key].double() + tau, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("scheme", ["linear", "ties", "dare"])
def test_scales_start_at_one(scheme: By) -> None:
    a, b = pair(mlp(), IA3(), IA3(), where=["0"])
    taus = [{key: tensor.double() - 1 for key, tensor in delta.state_dict().items()} for delta in (a, b)]
    combined = dt.combine({a: WEIGHTS[0], b: WEIGHTS[1]}, scheme, name="c", density=0.5)
    for key, tau in by_hand(scheme, taus, 0.5, 0).items():
        torch.testing.assert_close(combined.state_dict()[key].double(), 1 + tau, atol=1e-6, rtol=1e-6)


def test_sparse_values_at_other_places() -> None:
    model = mlp()
    before = state(model)
    a, b = pair(model, FISHMask(density=0.1), FISHMask(density=0.1))
    for k, delta in enumerate((a, b)):
        for entry in delta.entries:
            patch = cast("Any", entry.patch)
            patch.choose(torch.arange(len(patch.index)) * 2 + k)
        train(delta, seed=k)
    changes = []
    for delta in (a, b):
        dt.switch(model, delta.name)
        dt.merge(delta)
        changes.append({key: model.state_dict()[key].double() - before[key].double() for key in before})
        dt.unmerge(delta)
    combined = dt.combine({a: WEIGHTS[0], b: WEIGHTS[1]}, name="c", enable=False)
    dt.switch(model, "c")
    dt.merge(combined)
    for key in before:
        expected = before[key].double() + WEIGHTS[0] * changes[0][key] + WEIGHTS[1] * changes[1][key]
        torch.testing.assert_close(model.state_dict()[key].double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", methods)
def test_every_method(name: str, tmp_path: Path) -> None:
    """The mean of two equal deltas is the delta; the sum with weights 1 and 0 is the first. It saves and loads like any other."""
    model, inputs = backbone("bert", head=1)
    deltas = []
    for k in range(3):
        torch.manual_seed(5 * (k == 2))
        delta = train(dt.attach(model, small(name), name="abc"[k]), seed=int(k == 2))
        if isinstance(delta.method, Exported):
            delta.method.export(delta.patches, delta.shared)
        delta.disable()
        deltas.append(delta)
    a, b, c = deltas
    with torch.no_grad():
        dt.switch(model, "a")
        expected = output(model, inputs)
        dt.combine({a: 0.5, b: 0.5}, name="mean", enable=False)
        dt.switch(model, "mean")
        torch.testing.assert_close(output(model, inputs), expected, atol=1e-4, rtol=1e-4)
        try:
            first = dt.combine({"a": 1, "c": 0}, name="first", backbone=model, enable=False)
        except Unsupported as refused:
            assert name == "masking" and "masks cannot be added" in str(refused)
            return
        dt.switch(model, "first")
        torch.testing.assert_close(output(model, inputs), expected, atol=1e-4, rtol=1e-4)
    dt.save(first, tmp_path / "d")
    other, _ = backbone("bert", head=2)
    dt.load(other, tmp_path / "d")
    with torch.no_grad():
        torch.testing.assert_close(output(other, inputs), output(model, inputs), atol=1e-5, rtol=1e-5)
    assert c.name == "c"


@pytest.mark.parametrize(("scheme", "theirs"), [("cat", "cat"), ("svd", "svd"), ("ties", "ties_svd")])
def test_as_peft_where_it_is_right(scheme: By, theirs: str) -> None:
    """Its ``linear`` is not: equal deltas at weights of a half give twice the change. It trims each matrix alone: here is one."""
    model = mlp()
    a, b = pair(model, LoRA(rank=2, alpha=4), LoRA(rank=2, alpha=4), where=["0"])
    other = peft.get_peft_model(mlp(), peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0"]), "one")
    other.add_adapter("two", peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0"]))
    layer = cast("Any", other.base_model.model)[0]
    with torch.no_grad():
        for delta, name in ((a, "one"), (b, "two")):
            layer.lora_A[name].weight.copy_(delta.state_dict()["0.lora_A"])
            layer.lora_B[name].weight.copy_(delta.state_dict()["0.lora_B"])
    cast("Any", other).add_weighted_adapter(["one", "two"], [0.7, 0.3], "sum", combination_type=theirs, density=0.5)
    combined = dt.combine({a: 0.7, b: 0.3}, scheme, density=0.5)
    torch.testing.assert_close(change(combined, "0").float(), layer.get_delta_weight("sum"), atol=1e-5, rtol=1e-4)
    cast("Any", other).set_adapter("sum")
    x = torch.randn(3, 6)
    with torch.no_grad():
        torch.testing.assert_close(model(x), other(x), atol=1e-5, rtol=1e-4)


def test_peft_s_linear_is_not_linear() -> None:
    other = peft.get_peft_model(mlp(), peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), "one")
    other.add_adapter("two", peft.LoraConfig(r=2, target_modules=["0"]))
    layer = cast("Any", other.base_model.model)[0]
    with torch.no_grad():
        for part in (layer.lora_A, layer.lora_B):
            part["two"].weight.copy_(part["one"].weight)
    cast("Any", other).add_weighted_adapter(["one", "two"], [0.5, 0.5], "sum", combination_type="linear")
    torch.testing.assert_close(layer.get_delta_weight("sum"), 2 * layer.get_delta_weight("one"))


def test_dare_keeps_the_mean_and_follows_its_seed() -> None:
    model = nn.Sequential(nn.Linear(200, 100))
    [a] = pair(model, methods["full"](), where=["0"])
    found = {}
    for name, seed in (("x", 0), ("y", 0), ("z", 1)):
        combined = dt.combine({a: 1.0}, "dare", name=name, density=0.25, seed=seed, enable=False)
        entry = next(entry for entry in combined.entries if entry.key == "0.weight")
        found[name] = combined.state_dict()["0.weight"] - entry.choice.original
    assert torch.equal(found["x"], found["y"]) and not torch.equal(found["x"], found["z"])
    kept = (found["x"] != 0).float().mean()
    assert 0.23 < kept < 0.27
    whole = next(entry for entry in a.entries if entry.key == "0.weight")
    tau = a.state_dict()["0.weight"] - whole.choice.original
    torch.testing.assert_close(found["x"][found["x"] != 0], (tau / 0.25)[found["x"] != 0], atol=1e-5, rtol=1e-4)


def test_who_acts_afterwards() -> None:
    model, x = mlp(), torch.randn(2, 6)
    plain = model(x).detach()
    a, b = pair(model, LoRA(rank=2), LoRA(rank=2))
    both = model(x).detach()
    resting = dt.combine({a: 1.0, b: 1.0}, name="rest", enable=False)
    assert (a.enabled, b.enabled, resting.enabled) == (True, True, False) and torch.equal(model(x), both)
    acting = dt.combine({"a": 1.0, "b": 1.0}, backbone=model)
    assert (a.enabled, b.enabled, acting.enabled, acting.name) == (False, False, True, "linear-a-b")
    for delta in (a, b, resting, acting):
        dt.detach(delta)
    assert torch.equal(model(x), plain)


def test_ranks_of_several_roles(tmp_path: Path) -> None:
    model, inputs = backbone("llama")
    recipe = LoRA(rank=2, ranks=(("attention.value", 1),))
    a, b = pair(model, recipe, LoRA(rank=3), where=None)
    combined = dt.combine({a: 0.5, b: 0.5}, name="c")
    assert {combined.state_dict()[f"model.layers.0.self_attn.{part}_proj.lora_A"].shape[0] for part in "qv"} == {5, 4}
    dt.save(combined, tmp_path / "c")
    other, _ = backbone("llama")
    dt.load(other, tmp_path / "c")
    with torch.no_grad():
        torch.testing.assert_close(output(other, inputs), output(model, inputs), atol=1e-5, rtol=1e-5)


def test_embeddings_convolutions_and_experts() -> None:
    for name, where in (
        ("gpt2", ["wte", "attention.query"]),
        ("conv_net", ["conv1", "conv2"]),
        ("mixtral", ["experts.up", "experts.down"]),
    ):
        model, inputs = backbone(name)
        a, b = pair(model, LoRA(rank=2), LoRA(rank=2), where=where)
        for kind in ("linear", "ties"):
            combined = dt.combine({a: 0.5, b: 0.5}, cast("By", kind), name=f"{kind}", density=1.0, enable=False)
            assert output(model, inputs).isfinite().all() and not combined.enabled
        a.disable()
        b.disable()
        dt.combine({a: 1.0}, name="alone")
        found = output(model, inputs).detach()
        dt.switch(model, "a")
        torch.testing.assert_close(output(model, inputs).detach(), found, atol=1e-5, rtol=1e-4)


REFUSED: list[tuple[type[Exception], str, Any]] = [
    (Unsupported, "`a` is a lora and `b` a ia3. Combine deltas of one method", lambda m: pair(m, LoRA(rank=2), IA3(), where=["0"])),
    (Unsupported, "is a lora and `b` a lora-plus", lambda m: pair(m, LoRA(rank=2), LoRAPlus(rank=2))),
]


@pytest.mark.parametrize(("kind", "words", "make"), REFUSED, ids=[words for _, words, _ in REFUSED])
def test_what_cannot_be_added(kind: type[Exception], words: str, make: Any) -> None:
    a, b = make(mlp())
    with pytest.raises(kind, match=words):
        dt.combine({a: 0.5, b: 0.5})


def test_errors() -> None:
    model = mlp()
    a, b = pair(model, LoRA(rank=2), LoRA(rank=2))
    before = state(model)
    names = [name for name, _ in model.named_modules()]
    [elsewhere] = pair(mlp(), LoRA(rank=2))
    [other_site] = [dt.attach(model, LoRA(rank=2), "0", name="o")]
    for words, kind, call in [
        ("Give deltas with their weights", InvalidValue, lambda: dt.combine({})),
        ("Give deltas with their weights", InvalidValue, lambda: dt.combine(cast("Any", [a, b]))),
        ("Pass backbone=", InvalidValue, lambda: dt.combine({"a": 1.0})),
        ("`nobody`", UnknownName, lambda: dt.combine({"nobody": 1.0}, backbone=model)),
        ("several backbones", Unsupported, lambda: dt.combine({a: 1.0, elsewhere: 1.0})),
        ("twice", InvalidValue, lambda: dt.combine({a: 1.0, "a": 1.0}, backbone=model)),
        ("No scheme is called `lienar`. Did you mean `linear`", InvalidValue, lambda: dt.combine({a: 1.0}, cast("Any", "lienar"))),
        ("the weight nan", InvalidValue, lambda: dt.combine({a: float("nan")})),
        ("the weight '1'", InvalidValue, lambda: dt.combine({a: cast("Any", "1")})),
        ("density=0", InvalidValue, lambda: dt.combine({a: 1.0}, "ties", density=0)),
        ("rank=0", InvalidValue, lambda: dt.combine({a: 1.0}, rank=0)),
        ("do not sit at the same sites", Unsupported, lambda: dt.combine({a: 0.5, other_site: 0.5})),
        ("`a` is attached already", InvalidValue, lambda: dt.combine({a: 1.0}, name="a")),
    ]:
        with pytest.raises(kind, match=words):
            call()
    dt.detach(other_site)
    assert same({k: v for k, v in state(model).items() if k in before}, before)
    assert [name for name, _ in model.named_modules()] == names
    dt.detach(b)
    with pytest.raises(Unsupported, match="was detached"):
        dt.combine({a: 0.5, b: 0.5})


def test_schemes_of_factors_and_ranks() -> None:
    a, b = pair(mlp(), BitFit(), BitFit())
    for scheme in ("cat", "svd"):
        with pytest.raises(Unsupported, match="combines the factors of low-rank deltas"):
            dt.combine({a: 0.5, b: 0.5}, cast("By", scheme))
    with pytest.raises(InvalidValue, match="has no rank"):
        dt.combine({a: 0.5, b: 0.5}, rank=2)


def test_other_fields_and_shapes() -> None:
    model, _ = backbone("bert")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a, b = pair(model, PromptTuning(num_virtual_tokens=2), PromptTuning(num_virtual_tokens=3), where=None, head=False)
        with pytest.raises(Unsupported, match="differ in num_virtual_tokens: 2 and 3"):
            dt.combine({a: 0.5, b: 0.5})
    c, d = (dt.attach(model, LoRA(rank=2), name=name, head=name == "c") for name in ("c", "d"))
    with pytest.raises(Unsupported, match=r"only one of them has `classifier.bias`, `classifier.weight`"):
        dt.combine({c: 0.5, d: 0.5})


def test_heads_alone_and_within_a_composition() -> None:
    model, _ = backbone("bert")
    a, b = pair(model, LinearProbe(), LinearProbe(), where=None)
    expected = 0.25 * a.state_dict()["classifier.weight"] + 0.75 * b.state_dict()["classifier.weight"]
    dt.combine({a: 0.25, b: 0.75}, name="c")
    torch.testing.assert_close(model.classifier.weight, expected)
    model = mlp()
    a, b = pair(model, LoRA(rank=2), LoRA(rank=2))
    dt.compose(model, [a, b], name="both")
    with pytest.raises(Unsupported, match="acts within the composition `both`"):
        dt.combine({a: 0.5, b: 0.5})
    assert not dt.combine({a: 0.5, b: 0.5}, enable=False).enabled
