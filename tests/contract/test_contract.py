"""The contract matrix: every family of `headspring.models.families` keeps every identity, and every check can fail.

A new family is one registration and no new line here. A new identity is one check and at least one planted bug.
"""

import pytest

from headspring.models.families import FAMILIES
from tests.contract import bugs, checks, training_checks
from tests.models.conftest import randomise

# What every model owes.
EVERY = {
    checks.shapes: [bugs.one_logit_short, bugs.half_precision_logits],
    checks.masked_is_removed: [bugs.padding_ignored, bugs.segments_ignored],
    checks.one_row_is_many_rows: [bugs.rows_leak_into_each_other],
    checks.left_padded_is_unpadded: [bugs.padding_ignored],
    checks.packed_is_separate: [bugs.segments_ignored],
    checks.looking_changes_nothing: [bugs.looking_scales],
    training_checks.loss_mask_is_respected: [bugs.mask_ignored],
    training_checks.saved_and_loaded_is_bitwise: [bugs.saved_in_half_precision],
}
# What learns by gradients, through a stream of layers.
TRAINED = {
    checks.the_stream_is_the_sum_of_its_parts: [bugs.stream_added_twice],
    checks.patching_everything_restores_everything: [bugs.edits_dropped],
    training_checks.overfits_one_batch: [bugs.blind_to_its_input],
    training_checks.resume_is_bitwise: [bugs.optimizer_forgotten],
    training_checks.accumulation_is_one_batch: [bugs.mean_of_means],
    training_checks.an_all_masked_batch_is_zero: [bugs.mean_over_nothing, bugs.mask_ignored],
    training_checks.exported_is_the_same_in_transformers: [bugs.exported_in_another_pairing],
}
# What learns by counting.
COUNTED = {training_checks.counts_are_those_of_documents: [bugs.documents_run_together]}
CAUSAL = {
    checks.causality: [bugs.leaks_from_the_future, bugs.sees_the_future],
    checks.state_law: [bugs.cache_off_by_one, bugs.padding_forgotten_after_prefill, bugs.padding_ignored],
    checks.rewind: [bugs.rewind_leaves_one],
    checks.select: [bugs.select_forgets_values, bugs.select_forgets_padding],
    checks.fork: [bugs.copies_end_to_end],
}
BOTH_WAYS = {
    checks.sees_both_ways: [bugs.blind_to_the_future],
    checks.has_no_state: [bugs.pretends_to_have_a_state],
}


def matrix(config) -> dict:
    """The identities of a model, and for each the bugs that it must see. What a causal model owes to its state, one that
    sees both ways does not have; it says so itself."""
    return EVERY | (COUNTED if config.counted else TRAINED) | (CAUSAL if config.causal else BOTH_WAYS)


def build(name: str):
    return checks.sourced(randomise(FAMILIES[name]().build()).eval())


def identities():
    for name, tiny in FAMILIES.items():
        for check in matrix(tiny()):
            yield pytest.param(name, check, id=f"{name}-{check.__name__}")


@pytest.mark.parametrize(("name", "check"), list(identities()))
def test_identity(name, check):
    check(build(name))


def planted():
    """Every family with every bug that can be planted in it."""
    for name, tiny in FAMILIES.items():
        model = tiny().build()
        for check, bugs_of_one in matrix(model.config).items():
            for bug in bugs_of_one:
                if getattr(bug, "applies", lambda model: True)(model):
                    yield pytest.param(name, check, bug, id=f"{name}-{check.__name__}-{bug.__name__}")


@pytest.mark.parametrize(("name", "check", "bug"), list(planted()))
def test_the_check_sees(name, check, bug):
    model = build(name)
    with bug(model), pytest.raises(AssertionError):
        check(model)


def test_every_identity_has_a_control():
    rows = [*EVERY.values(), *TRAINED.values(), *COUNTED.values(), *CAUSAL.values(), *BOTH_WAYS.values()]
    assert all(rows)
    used = {bug for bugs_of_one in rows for bug in bugs_of_one}
    defined = {value for value in vars(bugs).values() if getattr(value, "__module__", "") == bugs.__name__}
    assert used == defined - {bugs.only, bugs.reads_masks}
    assert used == {parameter.values[2] for parameter in planted()}  # each in at least one family
