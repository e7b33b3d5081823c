"""What must not change the numbers on one device: packing, recomputation, accumulation, scanning; and bfloat16 within its band."""
import jax
import numpy as np

from effmodels.config import OFFLOAD, SAVE, SAVEABLE
from effmodels.layers.context import Ctx
from effmodels.models.blocks import DROPOUT_CHANNEL, DROPOUT_MIXER
from effmodels.models.decoder import DROPOUT_EMBED
from effmodels.parallel.stack import REMAT_POLICIES
from effmodels.verify import compare, draw
from effmodels.verify.mesh_check import auxiliary_missing, compare_sums, explain, leaf_row, split_rows, stale_keys, sum_of
from effmodels.verify.report import Outcome, row

TOKEN = 1e-4  # of a token's cross entropy
BF16_ROUNDING, BF16_LOSS, CLOSER, FURTHER = 2.0**-9, 2.0**-6, 8.0, 32.0


def packed(case):
    """`Outcome`: every document of a packed row has the losses and gradients that it has alone."""
    outcome = Outcome("packed")
    # A capacity is shared by a row, so that a document alone keeps tokens that it loses in company: compared without one.
    mode = "eval" if any(getattr(k.channel.config, "capacity_factor", None) for k in case.one.model.resolved.layers) else "train"
    batch = case.with_experts(case.batch, None, mode)  # a document keeps its choices where it is alone
    together = case.reference(batch, auxiliary=False, mode=mode, with_key=False)
    batches, places = draw.alone(batch)
    singles = [case.reference(b, auxiliary=False, mode=mode, with_key=False) for b in batches]
    worst, named = 0.0, []
    for (b, start, stop), (i, r) in zip(draw.documents(batch), places):
        weights = batch["weights"][b, start:stop] > 0
        got, want = together.ce_BT[b, start:stop], singles[i].ce_BT[r, : stop - start]
        error = np.where(weights, np.abs(got - want) / (1 + np.abs(want)), 0)
        error = np.where(np.isfinite(error), error, np.inf)
        worst = max(worst, float(error.max(initial=0)))
        if error.max(initial=0) > TOKEN:
            named.append((b, start, int(np.argmax(error > TOKEN))))
    outcome.rows.append(row("packed", f"loss of every token, {len(places)} documents", worst, TOKEN))
    leaves = case.compared(together.grads, sum_of(singles).grads)
    outcome.rows.append(leaf_row("packed", f"gradient sum, worst of {len(leaves)}", leaves))
    outcome.leaves = compare.table(leaves, {})
    if named:
        b, start, offset = named[0]
        text = f"row {b}: the document from token {start} differs from its token {offset} on"
        if all(start for _, start, _ in named):
            text += "; only documents behind another one do: a mask or a state crosses the boundary between documents"
        outcome.explanations.append(text)
    elif not outcome.passed:
        outcome.explanations.append("the losses agree and the gradients do not: a backward pass crosses the boundary between documents")
    return outcome


def remat(case):
    """`Outcome`: each recomputation policy gives the loss and gradients of none."""
    outcome, want = Outcome("remat"), case.reference()
    by_name = SAVE + ",".join(n for n in SAVEABLE if n != "embed") + f"+{OFFLOAD}embed"
    for policy in (*REMAT_POLICIES, by_name):
        setup = case.compiled(f"remat setup {policy}", lambda p=policy: case.setup(case.devices[:1], mesh={}, remat=p))
        got = case.reference(variant=f"remat {policy}", setup=setup)
        leaves = case.compared(got.grads, want.grads)
        loss = compare.relative(got.ce_sum, want.ce_sum)
        outcome.rows.append(row("remat", f"{policy}: cross entropy", loss, case.bounds.loss))
        outcome.rows.append(leaf_row("remat", f"{policy}: gradients, worst of {len(leaves)}", leaves))
        if not all(r.passed for r in outcome.rows[-2:]):
            forward = loss > case.bounds.loss
            what = "the forward pass differs" if forward else "what is recomputed in the backward pass is not what was computed"
            outcome.explanations.append(f"remat={policy}: {what}; {', '.join(compare.patterns(leaves)[:6])}")
            outcome.leaves = compare.table(leaves, {})
    return outcome


def accumulation(case, micro_batches=2):
    """`Outcome`: train's sums over micro-batches are those of the whole batch, and the one division is by all target tokens."""
    outcome, batches = Outcome("accumulation"), split_rows(case.batch, micro_batches)
    got = case.trained(case.one, batches, "accumulated")
    by_micro = [case.reference(b, micro=m) for m, b in enumerate(batches)]
    additive = not case.user.model.dropout and not _balanced_over_batch(case)
    leaves = compare_sums(outcome, case, got, case.reference() if additive else sum_of(by_micro))
    outcome.leaves = compare.table(leaves, {})
    if not outcome.passed:
        outcome.explanations += _explain_accumulation(case, got, by_micro, leaves, batches)
    return outcome


def dropout(case):
    """`Outcome`: every layer and site draws masks of its own, and scanned layers draw those of unrolled ones."""
    outcome = Outcome("dropout")
    if not case.user.model.dropout:
        outcome.skipped = "model.dropout is 0"
        return outcome
    ctx, layers = Ctx(key=case.key()), case.user.model.num_layers
    sites = [(-1, DROPOUT_EMBED)] + [(i, site) for i in range(layers) for site in (DROPOUT_MIXER, DROPOUT_CHANNEL)]
    drawn = {}
    for layer, site in sites:
        drawn.setdefault(_words(ctx.at_layer(layer).key_for(site)), []).append((layer, site))
    repeated = [places for places in drawn.values() if len(places) > 1]
    outcome.rows.append(row("dropout", f"keys used again, of {len(sites)} layers and sites", len(sites) - len(drawn), 0))
    if repeated:
        outcome.explanations.append(f"stale key: the same dropout key serves layers {sorted({layer for layer, _ in repeated[0]})[:8]}")
    setup = case.compiled("unrolled setup", lambda: case.setup(case.devices[:1], mesh={}, scan_layers=False))
    got, want = case.reference(), case.reference(variant="unrolled", setup=setup)
    leaves = compare_sums(outcome, case, got, want)
    outcome.leaves = compare.table(leaves, {})
    if not compare.agree(leaves):
        outcome.explanations.append("scanned layers draw other masks than unrolled ones: the key does not follow the absolute layer")
    return outcome


def bfloat16(case):
    """`Outcome`: bfloat16 is as far from float32 as its rounding explains: not further, nor closer, which would mean that it is not used.

    The yardstick: what rounding the parameters alone, each by up to 2^-9, does to the float32 model; activations are rounded as well, about
    a dozen times per layer, hence a band around it. Compared are the median token's loss and the lower quartile of the leaves: a norm of a
    sum near zero, or nearly tied scores of experts, may turn a few tokens altogether and with them whatever lies below.
    """
    outcome, want = Outcome("bf16"), case.reference()
    setup = case.compiled("bf16 setup", lambda: case.setup(case.devices[:1], mesh={}, compute_dtype="bfloat16"))
    got = case.reference(variant="bf16", setup=setup)
    rounded = [case.reference(params=params) for params in case.perturbed(BF16_ROUNDING)]
    outcome.rows.append(row("bf16", "cross entropy", compare.relative(got.ce_sum, want.ce_sum), BF16_LOSS))
    for what, distance in (("loss of every token, median", _token_distance), ("gradients, lower quartile of leaves", _leaf_distance)):
        rounding, error = np.mean([distance(r, want) for r in rounded]), distance(got, want)
        outcome.rows.append(row("bf16", what, error, rounding * FURTHER, least=rounding / CLOSER))
        if error < rounding / CLOSER:
            outcome.explanations.append(f"{what}: closer than bfloat16 can be: compute_dtype has no effect")
        elif not outcome.rows[-1].passed:
            outcome.explanations.append(f"{what}: further from float32 than the rounding of bfloat16 explains")
    return outcome


def _token_distance(got, want):
    valid = want.ce_BT != 0
    return float(np.median(np.abs(got.ce_BT - want.ce_BT)[valid]))


def _leaf_distance(got, want):
    return float(np.quantile([leaf.error for leaf in compare.compare(got.grads, want.grads, 1.0)], 0.25))


def _explain_accumulation(case, got, by_micro, leaves, batches):
    said = stale_keys(case, got, batches) + auxiliary_missing(case, got, batches)
    weights = np.array([s.weight_sum for s in by_micro])
    product = got.scale * weights.sum()
    if abs(product - 1) > 1e-6:
        said.append(f"wrong scale: the optimiser's factor times the target tokens is {product:.4f}, it should be 1")
    factor = leaves[0].along
    if leaves[0].failed and leaves[0].rest <= compare.PROPORTIONAL:
        k, factor = len(batches), leaves[0].along
        known = ((1 / k, f": divided by the {k} micro-batches"), (k, f": multiplied by the {k} micro-batches"))
        why = [text for value, text in known if abs(factor - value) < 0.01]
        said.append(f"wrong scale in accumulation: the gradient sums are {factor:.3f} times those of the whole batch{''.join(why)}")
    means = [{n: g / max(w, 1) * weights.sum() / len(by_micro) for n, g in s.grads.items()} for s, w in zip(by_micro, weights)]
    mean_of_means = {n: sum(m[n] for m in means) for n in means[0]}
    if not compare.agree(leaves) and compare.agree(case.compared(got.grads, mean_of_means)):
        said.append("wrong scale in accumulation: the mean of the micro-batches' means was taken, which weighs short ones too much")
    last = by_micro[-1].grads
    if not compare.agree(leaves) and compare.agree(case.compared(got.grads, last)):
        said.append("only the last micro-batch is in the sums")
    return said or explain(case, got, sum_of(by_micro), leaves, batches)


def _balanced_over_batch(case):
    return any(getattr(kind.channel.config, "balance", "row") == "batch" for kind in case.one.model.resolved.layers)


def _words(key):
    return tuple(np.asarray(jax.random.key_data(key)).ravel().tolist())
