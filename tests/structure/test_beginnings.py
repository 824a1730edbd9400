"""Where a sub-layer begins, and how many heads an attention has, on every architecture."""

from __future__ import annotations

import pytest

from deltatune.errors import Unsupported
from deltatune.structure.index import BEGINNINGS, index
from tests.conformance.cells import fresh
from tests.models import HEADS, LAYERS, MODELS

TRANSFORMERS = [name for name in MODELS if name not in ("conv_net", "mlp", "tied_mlp")]
SUB_LAYERS = {"t5": 5, "bart": 5, "mixtral": 1} | {"qwen3_moe": 1.5}
"""How many sub-layers end at a module, a layer; 2 where none is named: an attention and a feed-forward network."""


@pytest.mark.parametrize("model", TRANSFORMERS)
def test_every_sub_layer_begins_once(model: str) -> None:
    sites = index(fresh(model)[0])
    ends = [site for site in sites if ".".join((site.role or "").split(".")[-2:]) in BEGINNINGS]
    assert len(ends) == LAYERS * SUB_LAYERS.get(model, 2)
    for end in ends:
        first = sites.beginning(end)
        assert (first.layer, first.layer_list) == (end.layer, end.layer_list)
        assert (first.role or "").rpartition(".")[0] == (end.role or "").rpartition(".")[0]
        assert first.routable
        assert first.reached
        assert first.leaf in ("query", "up") or model == "deberta_v2", "DeBERTa's query is given positions, too"
    assert len({id(sites.beginning(end).module) for end in ends}) == len(ends)


@pytest.mark.parametrize("model", TRANSFORMERS)
def test_projections_know_the_heads_of_their_attention(model: str) -> None:
    sites = index(fresh(model)[0])
    projections = [site for site in sites if site.role and site.leaf in ("query", "key", "value", "output") and "attention" in site.role]
    assert projections
    assert {site.heads for site in projections} == {HEADS}
    assert {site.heads for site in sites if site not in projections} == {None}


def test_what_ends_no_sub_layer_says_so() -> None:
    sites = index(fresh("bert")[0])
    with pytest.raises(Unsupported, match=r"`bert\.pooler\.dense` \(role .*\), where no sub-layer ends\. Choose sites with the roles `att"):
        sites.beginning(sites["bert.pooler.dense"])
    sites = index(fresh("deberta_v2")[0])
    cut = sites["deberta.encoder.layer.0.attention.output.dense"]
    sites._in_layer = {}
    with pytest.raises(Unsupported, match=r"no single module of its layer .* \(looked for query, value, key\)\. Use a serial method there"):
        sites.beginning(cut)
