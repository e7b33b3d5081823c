"""What is known of a program's scalar operations before it runs: their order in a bundle, which share a register, where there are any."""
import re

from effmodels.plan.schedule.bundles import NotUnderstood


def _names(op):
    """Scalars that an operation reads."""
    texts = [*op.args, *(op.address or ()), op.otherwise or "", *op.labels.values()]
    found = [name for text in texts for name in re.findall(r"%([\w.]+)", text)]
    return found + ([op.guard[0]] if op.guard else [])


def in_order(ops):
    """Operations of a bundle, definitions before uses."""
    defining = {op.dest: op for op in ops if op.dest}
    ordered, seen = [], set()

    def visit(op):
        if id(op) in seen:
            return
        seen.add(id(op))
        for name in _names(op):
            if name in defining and defining[name] is not op:
                visit(defining[name])
        ordered.append(op)

    for op in ops:
        visit(op)
    return ordered


def webs(program):
    """Scalars joined by phis -> one representative. They must be in the same register: only then is a phi nothing to do."""
    parent = {}

    def root(name):
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    for ops in program.bundles:
        for op in ops:
            if op.name == "sphi":
                for arg in op.args:
                    if not arg.startswith("%") or arg.rsplit("_", 1)[1:] != op.dest.rsplit("_", 1)[1:]:
                        raise NotUnderstood(f"%{op.dest} = sphi {', '.join(op.args)}: not one register.")
                    parent[root(arg[1:])] = root(op.dest)
    return {name: root(name) for name in parent}


def next_with_work(code):
    following, later = [0] * (len(code) + 1), len(code)
    following[len(code)] = len(code)
    for index in range(len(code) - 1, -1, -1):
        if code[index][0]:
            later = index
        following[index] = later
    return following
