"""The mesh against one device: loss, every gradient leaf, auxiliary values, and one optimiser step fed with the same gradients.

Letters: B batch, T time, L layers, E experts.
"""
import jax
import numpy as np

from effmodels.parallel import layouts
from effmodels.train import grouping
from effmodels.train.state import TrainState
from effmodels.train.step import Sums as StepSums
from effmodels.verify import case as cases
from effmodels.verify import compare, draw
from effmodels.verify.report import LOADS, Outcome, row

UPDATE = 1e-3  # of an update from equal gradients: statistics over a whole array add in another order

def check(case):
    """`Outcome`: the config's mesh computes what one device computes."""
    outcome = Outcome("mesh")
    if case.mesh.mesh.size == 1:
        outcome.skipped = "the mesh is one device"
        return outcome
    batches = split_rows(case.batch, case.micro_batches)
    got = case.trained(case.mesh, batches, "mesh")
    want = sum_of([case.reference(b, micro=m) for m, b in enumerate(batches)])
    leaves = compare_sums(outcome, case, got, want)
    if not outcome.passed:
        outcome.explanations += explain(case, got, want, leaves, batches)
    outcome.leaves = compare.table(leaves, case.sizes)
    return outcome


def compare_sums(outcome, case, got, want):
    """Adds the rows of two `Sums`; returns the leaves."""
    name = outcome.check
    add = outcome.rows.append
    if want.load_LE is not None:
        add(row(name, LOADS, np.sum(np.asarray(got.load_LE) != np.asarray(want.load_LE)), 0, "numbers that differ"))
    add(row(name, "cross entropy", compare.relative(got.ce_sum, want.ce_sum), case.bounds.loss))
    add(row(name, "target tokens", abs(got.weight_sum - want.weight_sum), 0))
    for n in want.losses:
        add(row(name, n, compare.relative(got.losses[n], want.losses[n]), case.loss_bound(n)))
    if got.scale is not None:
        add(row(name, "scale of the gradients x target tokens", abs(got.scale * want.weight_sum - 1), 1e-6))
    leaves = case.compared(got.grads, want.grads)
    add(leaf_row(name, f"gradients, worst of {len(leaves)}", leaves))
    return leaves


def leaf_row(check_name, what, leaves):
    """The Row of the leaf that is worst in units of its bound."""
    if not leaves:
        return row(check_name, what, 0, 0)
    return row(check_name, what, leaves[0].error, leaves[0].bound, leaves[0].name.removeprefix("params:"))


def explain(case, got, want, leaves, batches):
    """Sentences on what failed, from the pattern of the failures and from runs of the reference with one thing wrong on purpose."""
    said = routing(case, got, want)
    loss_differs = compare.relative(got.ce_sum, want.ce_sum) > case.bounds.loss
    failing = compare.patterns(leaves)
    used = ", ".join(f"{a}={n}" for a, n in case.sizes.items() if n > 1)
    if not loss_differs and failing:
        said.append("the loss agrees and gradients do not: the fault is in a backward pass or in how gradients are summed")
    if loss_differs:
        said.append(f"the forward pass differs on the mesh {used}")
    if failing:
        said.append(f"{sum(leaf.failed for leaf in leaves)} of {len(leaves)} leaves differ: {', '.join(failing[:6])}")
    said += shared_reading(leaves, case.sizes)
    said += auxiliary_missing(case, got, batches)
    said += stale_keys(case, got, batches)
    if loss_differs:
        said += _unpermuted(case, got, batches) or _where(case)
    return said


def routing(case, got, want):
    """What the loads say, if they differ."""
    if want.load_LE is None or np.array_equal(got.load_LE, want.load_LE):
        return []
    difference = np.asarray(got.load_LE, np.float64) - np.asarray(want.load_LE)
    total = float(np.sum(got.load_LE)) / float(np.sum(want.load_LE))
    layer, expert = np.argwhere(difference)[0]
    counts = f"{got.load_LE[layer, expert]:g} tokens instead of {want.load_LE[layer, expert]:g}"
    said = [f"the routing differs first in MoE layer {layer} (counting those): expert {expert} has {counts}"]
    if abs(total - 1) > 0.01:
        counted = [f"{n} times over mesh axis {a}" for a, n in case.sizes.items() if n > 1 and abs(total - n) < 0.01 * n]
        said.append(f"all loads together are {total:.3f} of the reference: counted {' or '.join(counted) or 'wrongly'}")
    return said


def shared_reading(leaves, sizes):
    """One sentence when all failing leaves are off by the same factor."""
    failing = [leaf for leaf in leaves if leaf.failed]
    factors = [leaf.along for leaf in failing if leaf.rest <= compare.PROPORTIONAL]
    if len(failing) > 1 and len(factors) == len(failing) and np.ptp(factors) < 0.01 * max(1e-9, abs(np.mean(factors))):
        return [f"all of them: {compare.reading(failing[0], sizes)}"]
    return []


def auxiliary_missing(case, got, batches):
    """Whether the gradients are those of the cross entropy alone."""
    if not case.reference().losses:
        return []
    bare = sum_of([case.reference(b, micro=m, auxiliary=False) for m, b in enumerate(batches)])
    if not compare.agree(case.compared(got.grads, bare.grads)) or compare.agree(case.compared(bare.grads, case.reference().grads)):
        return []
    return [f"the gradients are those without the auxiliary losses ({', '.join(bare.losses)}): these are dropped"]


def stale_keys(case, got, batches):
    """Whether a random key was used again."""
    if case.key() is None:
        return []
    trials = {"of step 0 (the step is not folded in)": [(m, 0) for m in range(len(batches))]}
    if len(batches) > 1:
        trials["of micro-batch 0 for every micro-batch"] = [(0, cases.STEP)] * len(batches)
    said = []
    for text, keys in trials.items():
        trial = sum_of([case.reference(b, micro=m, step=s) for b, (m, s) in zip(batches, keys)])
        if compare.relative(got.ce_sum, trial.ce_sum) <= case.bounds.loss:
            said.append(f"stale key: the dropout masks are those {text}")
    return said


def split_rows(batch, count):
    """`count` micro-batches of the whole shape, of unequal numbers of rows that are not padding; their sums are those of the batch."""
    if count == 1:
        return [batch]
    rows = len(batch["tokens"])
    edges = [0, *(1 + (rows - 1) * i // count for i in range(1, count)), rows]
    place = np.arange(rows)
    return [draw.without_rows(batch, (place < a) | (place >= b)) for a, b in zip(edges, edges[1:])]


def sum_of(sums):
    """The `Sums` of several."""
    total = sums[0]
    for other in sums[1:]:
        total = total + other
    return total


def _unpermuted(case, got, batches):
    """Whether one of the batch's arrays was left in the order of the row while the others were put in the layout."""
    layout, pieces = case.mesh.options.layout, case.mesh.pieces
    if layout == "contiguous" or pieces == 1:
        return []
    for key in draw.KEYS:
        trial = [b | {key: np.ascontiguousarray(layouts.from_layout(b[key], layout, pieces))} for b in batches]
        sums = sum_of([case.reference(b, micro=m) for m, b in enumerate(trial)])
        if compare.relative(got.ce_sum, sums.ce_sum) <= case.bounds.loss:
            return [f"`{key}` was not permuted with the other arrays into the {layout} layout"]
    return []


def _where(case):
    """The first token of each row whose cross entropy differs, and what lies there."""
    try:
        got_BT = _token_losses(case)
    except NotImplementedError:
        return []
    want_BT = case.reference(with_key=False, auxiliary=False).ce_BT
    valid = case.batch["weights"] > 0
    wrong = valid & ~(np.abs(got_BT - want_BT) <= 1e-4 * (1 + np.abs(want_BT)))
    if not wrong.any():
        return []
    T, pieces, layout = wrong.shape[1], case.mesh.pieces, case.mesh.options.layout
    parts = pieces * (2 if layout == "zigzag" else 1)
    first = {b: int(np.argmax(wrong[b])) for b in np.flatnonzero(wrong.any(axis=1))}
    b, t = min(first.items(), key=lambda item: item[1])
    share = wrong.sum() / valid.sum()
    text = f"{share:.0%} of the tokens differ, first row {b} token {t}"
    edges = {T // parts * i for i in range(1, parts)} if pieces > 1 else set()
    near = [e for e in edges if any(abs(e - place) <= 1 for place in first.values())]
    if near:
        text += f"; rows begin to differ at token {', '.join(map(str, sorted(near)))}, an edge between sequence shards: "
        text += "a mask, a position or a state is off there"
    starts = {(r, s) for r, s, _ in draw.documents(case.batch) if s}
    if any((r, place + d) in starts for r, place in first.items() for d in (0, 1)):
        text += "; some rows begin to differ at the start of a document: the boundary is not respected"
    return [text]


def _token_losses(case):
    """The cross entropy of every token on the mesh, in the order of the row, without dropout."""
    setup = case.mesh
    program = case.compiled("mesh token losses", lambda: case.jit(cases.token_losses(setup.model)))
    params, buffers = case.placed(setup)
    with setup.context():
        ce_BT = jax.device_get(program(params, buffers, setup.put(case.batch)))
    return layouts.from_layout(ce_BT, setup.options.layout, setup.pieces)


def update(case):
    """`Outcome`: two optimiser steps with the reference's gradients give the same parameters, buffers and optimiser state on the mesh."""
    outcome, want = Outcome("update"), case.reference()
    if case.mesh.mesh.size == 1:
        outcome.skipped = "the mesh is one device"
        return outcome
    start = jax.device_get(case.one.optimizer.init(case.params))
    states = []
    for setup in (case.one, case.mesh):
        program = case.compiled(f"apply {setup.mesh.size}", lambda s=setup: _apply_program(case, s))
        states.append(_apply(case, setup, program, start, want))
    one, mesh = (_parts(grouping.leaves(state, setup.names)) for state, setup in zip(states, (case.one, case.mesh)))
    old = _parts(grouping.leaves(TrainState(np.int32(0), case.params, case.buffers, None), case.names))
    changes = [{n: new[n] - old[n] for n in new if n.startswith("params:")} for new in (mesh, one)]
    rest = [{n: x for n, x in new.items() if n.startswith(("opt_state", "buffers"))} for new in (mesh, one)]
    for (got, wanted), what in ((changes, "update from equal gradients"), (rest, "optimiser state and buffers")):
        leaves = compare.compare(got, wanted, UPDATE)
        outcome.rows.append(leaf_row("update", f"{what}, worst of {len(leaves)}", leaves))
        if not compare.agree(leaves):
            text = f"{what}: differs in {', '.join(compare.patterns(leaves)[:4])}; the worst is {compare.reading(leaves[0], case.sizes)}"
            outcome.explanations.append(text)
    return outcome


def _apply_program(case, setup):
    return case.jit(setup.functions.apply_step, out_shardings=(setup.shardings, None))


def _apply(case, setup, program, start, want):
    params, buffers = case.placed(setup)
    state = TrainState(np.int32(0), params, buffers, start)
    grads = draw.by_path(want.grads, setup.names, setup.abstract_params)
    with setup.context():
        state = jax.device_put(state, setup.shardings)
        for factor in (1.0, 0.5):  # the second step finds moments that are not zero
            scaled = jax.device_put({p: g * np.float32(factor) for p, g in grads.items()}, setup.shardings.params)
            sums = StepSums(scaled, np.float32(want.ce_sum), np.float32(want.weight_sum), want.losses, want.load_LE, want.drop_L)
            state, _ = program(state, sums, np.int32(1))
        return jax.device_get(state)


def _parts(leaves):
    """{canonical part: array} of `grouping.leaves`."""
    found = {}
    for leaf, value in leaves.values():
        for part, index in leaf.parts():
            found[part] = np.asarray(value if index is None else value[index], np.float64)
    return found
