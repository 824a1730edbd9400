"""Forms: what a lane can be, each with its formula for one lane and for many."""

from __future__ import annotations

from deltatune.multi.forms.affine import Affine
from deltatune.multi.forms.bottleneck import Bottleneck
from deltatune.multi.forms.decomposed import Decomposed
from deltatune.multi.forms.form import Form
from deltatune.multi.forms.lookup import Lookup
from deltatune.multi.forms.low_rank import LowRank
from deltatune.multi.forms.norm import Norm
from deltatune.multi.forms.scale import Scale
from deltatune.multi.forms.shift import Shift
from deltatune.multi.forms.stacked import Stacked
from deltatune.multi.forms.vectors import Vectors

FORMS: dict[str, Form] = {
    form.name: form for form in (LowRank(), Lookup(), Vectors(), Decomposed(), Scale(), Shift(), Norm(), Bottleneck(), Affine(), Stacked())
}
"""Every form by the name that lanes give."""
