r"""The ``where`` language: which sites of a backbone, said by role, path, glob, regular expression or function.

| entry | hits |
|---|---|
| ``attention.{query,value}`` | role patterns; braces are written out, and every form must hit |
| ``cross_attention.*``, ``encoder.attention.query`` | ``attention`` without a side means self and cross, in encoder and decoder |
| ``layer.0.output.dense`` | the end of a path, at a component boundary; a whole path means that module alone |
| ``h.*.mlp.*`` | a glob over the end of a path; ``*`` is every module |
| ``re:.*\.(fc1|fc2)`` | a regular expression that matches a whole path |
| ``lambda site: ...`` | any function of a Site |
| ``!lm_head`` | without these, and without what lies below them |
| ``cross_attention?``, ``!decoder.stack?`` | may be absent |

A fused projection that is hit as a whole is not hit again in its parts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from torch import nn

from deltatune.errors import InvalidValue, NoSite, nearest
from deltatune.structure.anatomy import has_parameters
from deltatune.structure.index import CONTAINERS, Index, has_weights
from deltatune.structure.index import index as index_of
from deltatune.structure.site import Site

Test = Callable[[Site], bool]
Where = str | Test | Sequence[str | Test]
Layers = int | str | range | Iterable[int]
"""``range(0, 6)``, ``[0, 11]``, ``5``, ``"top:3"`` (the last three) or ``"bottom:2"`` (the first two)."""

SIDES = ("encoder.", "decoder.")
MAX_LETTERS = 2**20
"""Of all that the braces of a pattern write out: few of them must not stand for gigabytes, as a file from elsewhere could have it."""
GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True, repr=False)
class Matches:
    """The sites that ``where`` hits, in module order, each once.

    Attributes:
        sites: the sites.
        counts: entry, with its braces written out -> how many sites it hit; for an exclusion, how many it removed.
        hits: entry -> the sites it hit, before exclusions.
    """

    sites: tuple[Site, ...]
    counts: dict[str, int] = field(default_factory=dict)
    hits: dict[str, tuple[Site, ...]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, position: int) -> Site:
        return self.sites[position]

    def __repr__(self) -> str:
        rows = [(site.role or "-", site.key or "(the backbone)", _shape(site)) for site in self.sites]
        widths = [max((len(row[k]) for row in rows), default=0) for k in range(2)]
        lines = [f"{role:{widths[0]}}  {key:{widths[1]}}  {shape}".rstrip() for role, key, shape in rows]
        counts = ", ".join(f"`{entry}` {count}" for entry, count in self.counts.items())
        return "\n".join([*lines, f"{len(self)} sites{': ' if counts else ''}{counts}"])


def find_sites(backbone: nn.Module, where: Where | None = None, layers: Layers | None = None, index: Index | None = None) -> Matches:
    """The sites of ``backbone`` that ``where`` hits; nothing is attached.

    Args:
        backbone: any module.
        where: see the module's table; None lists all sites that have a role or parameters.
        layers: keeps the sites of these layers, counted within each stack.
        index: the backbone's index, if it is known already.

    Raises:
        NoSite: an entry, or a layer, that hits nothing.
        InvalidValue: an entry or ``layers`` that cannot be read.

    >>> mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [site.path for site in find_sites(mlp, ["0", "2"])]
    ['0', '2']
    """
    index = index_of(backbone) if index is None else index
    wanted = None if layers is None else _Layers(layers, index)
    if where is None:
        return Matches(tuple(site for site in index if has_weights(site) and (wanted is None or site in wanted)))
    entries = [entry for written in _as_list(where) for entry in _entries(written)]
    chosen: dict[int, Site] = {}
    counts: dict[str, int] = {}
    by_entry: dict[str, tuple[Site, ...]] = {}
    for entry in _positive(entries):
        hits = entry.hits(index)
        kept = [site for site in hits if wanted is None or site in wanted]
        if not kept and not entry.optional:
            raise _outside(entry, hits, wanted) if hits and wanted else _nothing(entry, index)
        counts[entry.text] = len(kept)
        by_entry[entry.text] = tuple(kept)
        chosen |= {id(site): site for site in kept}
    for entry in entries:
        if entry.excludes:
            counts[entry.text] = _exclude(entry, chosen, index)
    if not chosen:
        raise NoSite(f"`where={where!r}` leaves no site of {type(backbone).__name__}. dt.find_sites(backbone) lists all sites.")
    return Matches(tuple(site for site in index if id(site) in chosen), counts, by_entry)


@dataclass(frozen=True)
class _Entry:
    """One entry with its braces written out; ``text`` is how it was said."""

    text: str
    pattern: str | Test
    excludes: bool = False
    optional: bool = False

    def hits(self, index: Index) -> list[Site]:
        """The sites it hits, whatever their layer."""
        if not isinstance(self.pattern, str):
            return _wholes([site for site in index if has_parameters(site.module) and self.pattern(site)])
        if self.pattern.startswith("re:"):
            return _wholes([site for site in _open(index) if _regular(self.pattern[3:]).fullmatch(site.key)])
        if self.pattern.strip("*."):
            by_role = [site for site in index if site.role and any(fnmatchcase(role, self.pattern) for role in spoken(site.role))]
            if by_role:
                return by_role
        if GLOB.search(self.pattern):
            patterns = (self.pattern, f"*.{self.pattern}")
            return _wholes([site for site in _open(index) if any(fnmatchcase(site.key, pattern) for pattern in patterns)])
        if self.pattern in index:
            return [site for site in index if site.key == self.pattern]
        return [site for site in index if site.key.endswith(f".{self.pattern}")]


ALL = _Entry("*", "*")


def spoken(role: str) -> list[str]:
    """The names by which ``role`` can be asked for.

    >>> spoken("decoder.cross_attention.query")
    ['decoder.cross_attention.query', 'cross_attention.query', 'attention.query']
    """
    names = [role]
    plain = next((role.removeprefix(side) for side in SIDES if role.startswith(side)), role)
    if plain != role:
        names.append(plain)
    if plain.startswith("cross_"):
        names.append(plain.removeprefix("cross_"))
    return names


def has_role(site: Site, patterns: Sequence[str]) -> bool:
    """Whether role patterns, as a method's default ``where``, hit the site by its role.

    >>> has_role(Site("h.0", nn.Linear(1, 1), role="decoder.attention.query"), ("attention.{query,value}", "stack?"))
    True
    """
    entries = [entry for pattern in patterns for entry in _entries(pattern)]
    hit = [entry for entry in entries if any(fnmatchcase(role, str(entry.pattern)) for role in spoken(site.role or ""))]
    return bool(hit) and not any(entry.excludes for entry in hit)


def _as_list(where: Where) -> list[str | Test]:
    entries = [where] if isinstance(where, str) or callable(where) else list(where)
    if not entries:
        raise InvalidValue("`where` is empty. Leave it out for the method's default roles, or name a role, a path or a pattern.")
    return entries


def _entries(written: str | Test) -> list[_Entry]:
    """Read one entry as it was written."""
    if not isinstance(written, str):
        if not callable(written):
            raise InvalidValue(f"`where` has the entry {written!r}, a {type(written).__name__}. Write a pattern, or a function of a Site.")
        return [_Entry(getattr(written, "__name__", repr(written)), written)]
    text = written.strip()
    excludes, optional = text.startswith("!"), text.endswith("?") and not text.removeprefix("!").startswith("re:")
    body = text.removeprefix("!").removesuffix("?") if optional else text.removeprefix("!")
    if not body:
        raise InvalidValue(f"`where` has the entry `{written}`, which names nothing. Write a role, a path or a pattern.")
    if body.startswith("re:"):
        _regular(body[3:])
        return [_Entry(text, body, excludes)]
    mark, end = "!" if excludes else "", "?" if optional else ""
    return [_Entry(f"{mark}{form}{end}", form, excludes, optional) for form in expand(body)]


def expand(pattern: str) -> list[str]:
    """``pattern`` with its braces written out.

    Raises:
        InvalidValue: a brace without its partner, or too many forms.

    >>> expand("attention.{query,value}")
    ['attention.query', 'attention.value']
    """
    done, left, letters = [], [pattern], 0
    while left:
        form = left.pop()
        found = re.search(r"\{([^{}]*)\}", form)
        if found is None:
            done.append(form)
            continue
        forms = [form[: found.start()] + part.strip() + form[found.end() :] for part in found[1].split(",")]
        letters += sum(map(len, forms))
        if letters > MAX_LETTERS:
            raise InvalidValue(f"`{pattern:.80}` stands for more than {MAX_LETTERS:,} letters. Write fewer braces, or a list.")
        left += reversed(forms)
    if any("{" in form or "}" in form for form in done):
        raise InvalidValue(f"`{pattern}` has a brace without its partner. Write alternatives as `attention.{{query,value}}`.")
    return done


def _regular(expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as cause:
        raise InvalidValue(f"`re:{expression}` is no regular expression: {cause}. Mask special characters with a backslash.") from cause


def _positive(entries: list[_Entry]) -> list[_Entry]:
    return [entry for entry in entries if not entry.excludes] or [ALL]


def _open(index: Index) -> list[Site]:
    """What patterns may hit: containers, and modules without parameters, must be named outright."""
    return [
        site
        for site in index
        if site.parameter is not None or (not isinstance(site.module, CONTAINERS) and (site.role or has_parameters(site.module)))
    ]


def _wholes(sites: list[Site]) -> list[Site]:
    """``sites`` without the parts of fused projections that are among them as a whole."""
    whole = {site.path for site in sites if site.rows is None}
    return [site for site in sites if site.rows is None or site.path not in whole]


def _exclude(entry: _Entry, chosen: dict[int, Site], index: Index) -> int:
    """Remove what ``entry`` hits, and what lies below it, from ``chosen``."""
    hits = entry.hits(index)
    if not hits and not entry.optional:
        raise _nothing(entry, index)
    keys = {site.key for site in hits}
    roots = tuple(f"{site.path}." for site in hits if site.rows is None and site.path)
    gone = [key for key, site in chosen.items() if site.key in keys or site.path.startswith(roots) or site.path in keys]
    if not gone and not entry.optional:
        raise NoSite(
            f"`{entry.text}` excludes nothing: it hits {_sites(len(hits))}, such as `{hits[0].key}`, "
            "but none that the other entries chose. Leave it out, or correct it."
        )
    for key in gone:
        del chosen[key]
    return len(gone)


class _Layers:
    """The layers asked for, checked against those that exist."""

    def __init__(self, layers: Layers, index: Index) -> None:
        self.asked = layers
        self.index = index
        self.numbers: frozenset[int] | None = None
        self.top = self.bottom = 0
        deepest = max(index.depths.values(), default=0)
        if deepest == 0:
            raise NoSite(f"`layers={layers!r}` was asked for, but {type(index.backbone).__name__} has no layers. Leave `layers` out.")
        if isinstance(layers, str) and not layers.isdigit():
            self._read(layers)
        else:
            self.numbers = frozenset(_numbers(layers))
        missing = sorted(number for number in self.numbers or () if not 0 <= number < deepest)
        if missing or max(self.top, self.bottom) > deepest:
            raise NoSite(
                f"`layers={layers!r}` was asked for, but {type(index.backbone).__name__} has layers 0 to {deepest - 1}. "
                'Layers count from 0; `layers="top:1"` is the last one.'
            )

    def _read(self, text: str) -> None:
        found = re.fullmatch(r"(top|bottom):([1-9]\d*)", text)
        if found is None:
            raise InvalidValue(f'`layers="{text}"` cannot be read. Write a range, a list, a number, "top:3" or "bottom:2".')
        setattr(self, found.group(1), int(found.group(2)))

    def __contains__(self, site: Site) -> bool:
        if site.layer is None:
            return False
        if self.numbers is not None:
            return site.layer in self.numbers
        depth = self.index.depths[self.index.layer_list(site) or ""]
        return site.layer >= depth - self.top if self.top else site.layer < self.bottom


def _numbers(layers: Layers) -> list[int]:
    if isinstance(layers, str):
        return [int(layers)]
    numbers = [layers] if isinstance(layers, int) or not isinstance(layers, Iterable) else list(layers)
    if not numbers or any(isinstance(number, bool) or not isinstance(number, int) for number in numbers):
        raise InvalidValue(f'`layers={layers!r}` cannot be read. Write a range, a list of numbers, a number, "top:3" or "bottom:2".')
    return numbers


def _outside(entry: _Entry, hits: list[Site], wanted: _Layers) -> NoSite:
    numbers = sorted({site.layer for site in hits if site.layer is not None})
    where = f"in layers {numbers[0]} to {numbers[-1]}" if numbers else "outside the layers"
    return NoSite(f"`{entry.text}` hits {_sites(len(hits))} {where}, none with `layers={wanted.asked!r}`. Change one of the two.")


def _nothing(entry: _Entry, index: Index) -> NoSite:
    """The error for an entry that hits nothing: near misses, and how to see what there is."""
    kind = type(index.backbone).__name__
    if not isinstance(entry.pattern, str) or entry.pattern.startswith("re:"):
        return NoSite(f"No site of {kind} matches `{entry.text}`. List the sites with dt.find_sites(backbone).")
    roles = {name for site in index if site.role for name in spoken(site.role)}
    group = f"{entry.pattern.rpartition('.')[0]}.*"
    inside = len(replace(entry, pattern=group).hits(index)) if group != ".*" and any(fnmatchcase(role, group) for role in roles) else 0
    if inside:
        listing = f"{_sites(inside)} {'has' if inside == 1 else 'have'} role `{group}`; list them with dt.find_sites(backbone)."
    else:
        listing = "List the sites with dt.find_sites(backbone)."
    components = entry.pattern.count(".") + 1
    names = {_tail(site.key, components) for site in index if has_weights(site) and site.key}
    hint = nearest(entry.pattern, {role for role in roles if role.count(".") < components} | names)
    if not hint.startswith("Did you mean"):
        hint = f"It has the roles {_listed(roles)}." if roles else f"It has no roles; its paths are {_listed(names)}."
    return NoSite(f"No site of {kind} matches `{entry.text}`. {hint} {listing}")


def _listed(names: set[str], most: int = 12) -> str:
    shown = ", ".join(f"`{name}`" for name in sorted(names)[:most])
    return f"{shown}{', ...' if len(names) > most else ''}"


def _tail(path: str, components: int) -> str:
    return ".".join(path.split(".")[-components:])


def _sites(count: int) -> str:
    return "1 site" if count == 1 else f"{count} sites"


def _shape(site: Site) -> str:
    parameter = site.parameter or "weight"
    tensor = site.module
    for name in parameter.split("."):
        tensor = getattr(tensor, name, None)  # type: ignore[assignment]
    shape = tuple(getattr(tensor, "shape", ()))
    rows = "" if site.rows is None else f", {site.out_features} rows"
    return f"{'x'.join(map(str, shape))}{rows}" if shape else ""
