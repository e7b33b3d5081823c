"""One change to try, from what a plan loses most to."""
from effmodels.plan import units
from effmodels.plan.report import binds

_MEMORY = {
    "parameters": "more chips on one axis that splits parameters: --config.mesh.fsdp or --config.mesh.tensor",
    "optimizer": "splitting the optimizer state too: a larger --config.mesh.fsdp, or --config.parallel.zero1=True",
    "gradients": "a larger --config.mesh.fsdp, or --config.train.accumulate_dtype=bfloat16",
    "activations": "a smaller --config.train.micro_batch_size",
    "temporaries": "a smaller --config.train.micro_batch_size",
}
_SERVING = {
    "parameters": _MEMORY["parameters"],
    "activations": "a smaller batch, or a larger --config.mesh.tensor",
    "temporaries": "a smaller batch",
}
AXES = {
    "fsdp": "more work per gathered weight: a larger --config.train.micro_batch_size, or fewer chips on fsdp and more on data",
    "tensor": "a smaller --config.mesh.tensor and a larger fsdp",
    "expert": "a smaller --config.mesh.expert, or shared experts whose matmuls run during the exchange",
    "seq": "a smaller --config.mesh.seq, so that each shard has more to compute per transfer",
    "data": "a larger batch, so that gradients are summed less often per token",
    "stage": "fewer --config.mesh.stage, or larger micro-batches",
}

_LOSS = {
    binds.MATMUL: "larger or rounder matrices (less tensor splitting, sizes in multiples of 256): matmuls run below the peak.",
    binds.KERNEL: "other block sizes or another form for the kernels among the costliest operations: they run below the peak.",
    binds.HBM: "a larger --config.train.micro_batch_size, or fewer passes over large arrays: operations wait for memory.",
    binds.BUBBLE: "a smaller --config.train.micro_batch_size, or a larger --config.parallel.rounds: stages of the pipeline stand idle.",
    binds.IMBALANCE: "another --config.parallel.layout: the chips of a ring wait for the slowest.",
}
_ENOUGH = 0.03  # share of the step from which a loss is worth a suggestion


def suggest(plan, shares):
    """One sentence from a `Plan` and its `binds.shares`: against what does not fit, else against the largest loss; "" if all are small."""
    if not plan.fits:
        return f"{_smaller(plan)}; --search tries such changes and names the smallest slice that fits."
    recomputed = sum(s.recomputed for s in shares)
    losses = [(s.share, s) for s in shares if s.what not in (binds.AT_PEAK, binds.OTHER)]
    losses += [(recomputed / plan.seconds, None)] if recomputed else []
    for share, loss in sorted(losses, key=lambda pair: -pair[0]):
        sentence = (_against(plan, loss) if loss else _recompute_less(plan)) if share >= _ENOUGH else ""
        if sentence:
            return sentence
    return ""


def _smaller(plan):
    parts = _MEMORY if plan.what == "train" else _SERVING
    largest = max(parts, key=lambda name: getattr(plan.memory, name))
    recomputes = plan.executed_flops > 1.2 * plan.model_flops
    return "--config.train.remat=full" if largest == "activations" and plan.what == "train" and not recomputes else parts[largest]


def _recompute_less(plan):
    room = plan.memory.available - plan.memory.total
    if room < plan.memory.activations:
        return ""
    return f"--config.train.remat=dots, or save:kernel,mlp, to recompute less: {units.size(room)} are free; --memory checks it quickly."


def _against(plan, loss):
    if loss.what == binds.EXPOSED:
        waits = f"the chips wait for {loss.collective or 'others'} over {'+'.join(loss.axes) or 'some chips'}"
        axis = next((a for a in loss.axes if a in AXES), None)
        return f"{AXES[axis] if axis and plan.what == 'train' else 'another mesh (--search)'}: {waits}."
    if loss.what == binds.HBM and plan.what == "decode":
        return "a larger batch: parameters are read once per step, however many sequences share them."
    if loss.what == binds.HBM and plan.what == "prefill":
        return "longer prompts or more of them in a --config.batch_size: operations wait for memory."
    return _LOSS.get(loss.what, "")
