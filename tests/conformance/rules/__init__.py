"""The engine's rules that every cell must keep, in the order in which a sitting goes through them.

A rule is a function of a ``Sitting`` that asserts one sentence. Listed here, it is checked on every cell named beside it.
"""

from __future__ import annotations

from tests.conformance.cells import KEPT_APART, MERGING, TAKEN, Cell
from tests.conformance.rules.copies import copies_are_independent
from tests.conformance.rules.gradients import (
    exactly_the_delta_gets_gradients,
    frozen_and_disabled_deltas_want_no_gradients,
    the_budget_is_what_is_counted,
    two_steps_move_the_delta_and_nothing_else,
)
from tests.conformance.rules.leaving import detaching_leaves_no_trace, two_deltas_leave_in_any_order
from tests.conformance.rules.merging import (
    merged_computes_the_same,
    merged_for_good,
    two_merged_deltas_unmerge_in_any_order,
    what_is_no_weight_says_so,
)
from tests.conformance.rules.precision import a_half_precision_backbone, autocast_leaves_a_fresh_delta_the_identity, autocast_trains
from tests.conformance.rules.presence import (
    a_fresh_delta_is_the_identity_where_promised,
    a_trained_delta_acts_and_rests,
    the_backbone_stays_itself,
)
from tests.conformance.rules.refusing import an_entry_that_hits_nothing_is_an_error
from tests.conformance.rules.together import a_second_delta_joins_the_first
from tests.conformance.sitting import Rule

RULES: dict[Rule, list[Cell]] = {
    # as attached
    a_fresh_delta_is_the_identity_where_promised: TAKEN,
    autocast_leaves_a_fresh_delta_the_identity: TAKEN,
    the_budget_is_what_is_counted: TAKEN,
    frozen_and_disabled_deltas_want_no_gradients: TAKEN,
    an_entry_that_hits_nothing_is_an_error: TAKEN,
    two_steps_move_the_delta_and_nothing_else: TAKEN,
    # trained
    the_backbone_stays_itself: TAKEN,
    a_trained_delta_acts_and_rests: TAKEN,
    a_second_delta_joins_the_first: TAKEN,
    exactly_the_delta_gets_gradients: TAKEN,
    autocast_trains: TAKEN,
    merged_computes_the_same: MERGING,
    two_merged_deltas_unmerge_in_any_order: MERGING,
    merged_for_good: MERGING,
    what_is_no_weight_says_so: KEPT_APART,
    # detached
    detaching_leaves_no_trace: TAKEN,
    copies_are_independent: TAKEN,
    two_deltas_leave_in_any_order: TAKEN,
    # on a backbone of its own
    a_half_precision_backbone: TAKEN,
}
