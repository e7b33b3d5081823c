"""Cycles of a TPU program from its final bundles: the scalar unit is executed, everything else is only issued.

The scalar unit decides which bundles run how often. A bundle takes one cycle, plus its waits: for copies between memories (a simple
model of one channel per core), and for matrix units. The compiler issues a `vmatmul` before its unit has taken in the rows of the one
before; then the bundle waits, and all after it, for issue is in order. With these waits a large matmul is within 2 % of libtpu's own
simulator on v5e and v5p, which have the same units. Queues in front of the units, with results after 60 to 84 cycles, change the grouped
matmul by 1 %; later results would forbid what XLA's own matmul reaches.

Values that cannot be known without the tensors are None and spread as None; where one decides a branch or the size of a copy, the run
records it instead of guessing in silence.

Legend: slot = index of a scalar's value in the machine's list of values; web = scalars joined by phis, which share one register.
"""
import bisect
import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence

from effmodels.plan.schedule import flow, scalar
from effmodels.plan.schedule.bundles import CHIP, CORE, NotUnderstood, Op, Program
from effmodels.plan.schedule.cores import Core
from effmodels.plan.schedule.scalar import MASK

_LIMIT = 30_000_000  # bundles with scalar work; a run that needs more has most likely misread a loop
_SPAN = 1 << 18  # words between two allocations: all of SMEM is not larger
_SPILLS = 1 << 31  # addresses of spilled scalars, apart from the rest
_OPERANDS, _OPERAND_SPAN, _MOST_OPERANDS = 1 << 24, 1 << 16, 256  # address of the first operand in HBM, room for each, how many
_SCALES = (0, 4)  # v5e's programs are given addresses in units of 512 bytes, and shift them to granules of 32
_TABLE_COPIES = ({"hbm", "smem"}, {"cmem", "smem"})


class DidNotEnd(RuntimeError):
    """The program ran past the limit of steps."""


@dataclasses.dataclass
class Run:
    """What one core did."""

    cycles: float
    issued: int  # bundles
    dma_wait: float  # cycles
    dma_bytes: int
    matmul_waits: dict[int, float]  # bundle -> cycles, in all, that it waited for a matrix unit
    executed: list[int]  # of each bundle, how often it ran
    loops: dict[tuple[int, int], int]  # (first bundle, last bundle) -> times it jumped back
    unknown_loads: dict[str, int]  # allocation -> reads of words that nobody wrote or gave
    unknown_ops: dict[str, int]  # operations whose result this simulator does not know, such as a value popped from the vector unit
    undecided: dict[str, int]  # decisions that hung on an unknown value, and were taken as "no"
    unfed: tuple[str, ...]  # operands read by the scalar unit whose values were not given
    unmatched_waits: int  # waits for copies that this core never started: the other core did
    results: dict[int, dict[int, int]]  # operand -> {word: value} written by the scalar unit


def run(program: Program, core: Core, number: int = 0, operands: Mapping[int, Sequence[int]] | None = None, limit: int = _LIMIT) -> Run:
    """Executes the program on core `number`; `operands` holds the 32-bit words of the operands whose values are known, by index."""
    return _Machine(program, core, number, operands or {}).run(limit)


class _Machine:
    """Decodes once: each operation becomes a function of the machine, its operands indices into one list of values."""

    def __init__(self, program, core, number, operands):
        self.core, self.number, self.given = core, number, operands
        self.values: list = []
        self.slots: dict = {}
        self.bases: dict[str, int] = {}
        self.memory: dict[int, int | None] = {}  # SMEM and spilled scalars, by word; None was written, but is not known
        self.written: dict[int, dict[int, int]] = collections.defaultdict(dict)  # operand -> {word: value}
        self.flags = collections.defaultdict(collections.deque)  # semaphore -> (end, granules) of copies on their way
        self.time, self.channel, self.waited, self.bytes, self.unmatched = 0.0, 0.0, 0.0, 0, 0
        # Matrix units are free again at these times.
        self.free, self.matmul_waits = [0.0] * core.matrix_units, collections.Counter()
        self.matmuls = program.matmuls if core.matrix_units else {}
        self.feeding = sorted(self.matmuls)
        self.unknown_loads, self.unknown_ops, self.undecided, self.unfed = (collections.Counter() for _ in range(4))
        self.regions = program.regions
        self.operand_names: dict[int, str] = {}
        self.webs = flow.webs(program)
        for operand in program.operands:
            self._place(operand)
        self.code = [self._bundle(ops, index) for index, ops in enumerate(program.bundles)]
        self.next = flow.next_with_work(self.code)

    # Names and values.

    def _slot(self, key, value=None):
        if key not in self.slots:
            self.slots[key] = len(self.values)
            self.values.append(value)
        return self.slots[key]

    def _read(self, text, here=frozenset()):
        """Slot of an argument; `here` are the scalars that the same bundle computes."""
        text = re.sub(r"^\[resolvable:\S+\] *| *\[#\w+\]$", "", text) if not text.startswith("[#") else text
        if text.startswith("%"):
            name = text[1:]
            web = self.webs.get(name)
            return self._slot(name) if web is None or name in here else self._slot(("web", web))
        return self._slot(("constant", text), self._constant(text))

    def _constant(self, text):
        if re.fullmatch(r"-?\d+", text):
            return int(text) & MASK
        if re.fullmatch(r"\$?0x[0-9a-f]+", text):
            return int(text.lstrip("$"), 16)
        terms = text.strip("[]").split(" + ")
        if terms[0].startswith("#allocation"):
            values = [self._base(terms[0][1:]), *(self._constant(t) for t in terms[1:])]
            return None if None in values else sum(values) & MASK
        return None  # a float, or something new: unknown, which shows only where it decides something

    def _base(self, allocation):
        if allocation not in self.bases:
            spilled = "spill" in allocation
            count = sum(("spill" in name) == spilled for name in self.bases)
            self.bases[allocation] = _SPILLS + 16 * count if spilled else (count + 1) * _SPAN
            if not spilled and self.bases[allocation] >= _SPILLS:
                raise NotUnderstood(f"more than {count} allocations.")
        return self.bases[allocation]

    def _place(self, operand):
        """Gives an operand an address, and puts its words there if they are known."""
        words = self.given.get(operand.index)
        name = f"operand {operand.index} {operand.dtype}[{','.join(map(str, operand.shape))}]"
        self.operand_names[operand.index] = name
        if operand.memory == "":
            value = None if words is None else int(words[0]) & MASK
            if value is None:
                self.unfed[operand.index] = name
        elif operand.memory == "smem":
            value = self._base(f"operand {operand.index}")
            self.memory |= {value + i: int(w) & MASK for i, w in enumerate(() if words is None else words)}
        elif operand.index >= _MOST_OPERANDS:
            raise NotUnderstood(f"more than {_MOST_OPERANDS} operands.")
        else:
            value = _OPERANDS + operand.index * _OPERAND_SPAN
        self.values[self._slot(operand.dest)] = value
        if (web := self.webs.get(operand.dest)) is not None:
            self.values[self._slot(("web", web))] = value

    # Decoding.

    def _bundle(self, ops, index):
        """Functions of one bundle in an order that respects its own definitions, and the scalars to hand to their webs at its end."""
        ops = [op for op in ops if op.name != "sphi"]  # both sides of a phi are in its register already
        here = {op.dest for op in ops if op.dest}
        steps = [self._step(op, index, here) for op in flow.in_order(ops)]
        commits = [(self._slot(name), self._slot(("web", self.webs[name]))) for name in here if name in self.webs]
        return steps, commits

    def _step(self, op: Op, index, here):
        def read(text):
            return self._read(text, here - {op.dest})

        if op.name.startswith("sbr"):
            step = self._branch(op)
        elif op.name == "dma.done.wait":
            step = self._wait(*map(read, op.args[:2]))
        elif op.name.startswith("dma."):
            step = self._copy(op, read)
        elif op.name == "vdelay":
            step = self._delay(read(op.args[0]))
        elif op.name == "sst":
            step = self._store(op, read)
        elif op.name == "sld":
            step = self._load(op, read)
        else:
            step = self._compute(op, read)
        return step if op.guard is None else self._guarded(op, step, read, index)

    def _guarded(self, op, step, read, index):
        predicate, wanted = read("%" + op.guard[0]), op.guard[1]
        dest = self._slot(op.dest) if op.dest else None
        otherwise = read(op.otherwise) if op.otherwise else None
        if otherwise is None and op.dest in self.webs:
            otherwise = self._slot(("web", self.webs[op.dest]))
        decides = not op.dest and op.name != "sst"
        kind = f"{op.name} in bundle {index:#x}"

        def guarded(m):
            holds = m.values[predicate]
            if holds is None:
                if decides:
                    m.undecided[kind] += 1
                elif dest is None:
                    step(m, forget=True)
                else:
                    m.values[dest] = None
            elif bool(holds) == wanted:
                return step(m)
            elif otherwise is not None:
                m.values[dest] = m.values[otherwise]
            return None

        return guarded

    def _compute(self, op, read):
        dest, args = self._slot(op.dest), [read(arg) for arg in op.args]
        if op.name == "scalar_select":
            chosen, yes, no = args

            def select(m):
                p = m.values[chosen]
                m.values[dest] = None if p is None else m.values[yes if p else no]

            return select
        if op.name in scalar.PREDICATES:
            f = scalar.PREDICATES[op.name]

            def predicate(m):
                known = [m.values[a] for a in args]
                m.values[dest] = f(*(None if value is None else bool(value) for value in known))

            return predicate
        if op.name == "spop.drf":  # of a division's two results, the next

            def pop(m):
                results = m.values[args[0]]
                m.values[dest] = results.pop(0) if results else None

            return pop
        f = scalar.function(op.name)
        if op.name == "sdivrem.u32":
            f = scalar.DIVISIONS[op.labels["results"]]
        if f is None:  # for example a value popped from the vector unit

            def unknown(m):
                m.unknown_ops[op.name] += 1
                m.values[dest] = None

            return unknown

        def compute(m):
            known = [m.values[a] for a in args]
            m.values[dest] = None if None in known else f(*known)

        return compute

    def _load(self, op, read):
        dest = self._slot(op.dest)
        if op.system:
            value = {CORE: self.number, CHIP: 0}[op.system]

            def system(m):
                m.values[dest] = value

            return system
        terms, name = [read(self._term(t)) for t in op.address], _allocation(op.address)

        def load(m):
            known = [m.values[t] for t in terms]
            value = None
            if None not in known:
                address = sum(known) & MASK
                if address not in m.memory:
                    m.unknown_loads[name] += 1
                value = m.memory.get(address)
            m.values[dest] = value

        return load

    def _store(self, op, read):
        terms, value = [read(self._term(t)) for t in op.address], read(op.args[0])
        base = next((self._base(t[1:]) for t in op.address if t.startswith("#")), None)

        def store(m, forget=False):
            known = [m.values[t] for t in terms]
            if None in known:  # it may have hit any word of the allocation
                m.forget(base)
            else:
                m.memory[sum(known) & MASK] = None if forget else m.values[value]

        return store

    @staticmethod
    def _term(text):
        return f"[{text}]" if text.startswith("#") else text

    def forget(self, base):
        self.memory |= {a: None for a in self.memory if base is None or base <= a < base + _SPAN}

    def _branch(self, op):
        target = self.regions[op.args[0]]
        return lambda m: target

    def _delay(self, cycles):
        def delay(m):
            if m.values[cycles] is None:
                m.undecided["vdelay"] += 1
            else:
                m.time += m.values[cycles]

        return delay

    def _copy(self, op, read):
        label = op.labels
        if "size_in_granules" not in label or "dst_syncflagno" not in label:
            raise NotUnderstood(f"copy {op.name} without size or flag: {label}.")
        size, flag = read(label["size_in_granules"]), read(label["dst_syncflagno"])
        source, _, target = op.name.removeprefix("dma.").partition("_to_")
        ends = [read(label[end]) for end in (source, target)] if {source, target} in _TABLE_COPIES else None

        def copy(m):
            granules, where = m.values[size], m.values[flag]
            if granules is None or where is None:
                m.undecided[op.name] += 1
                return
            number = granules * m.core.granule
            m.channel = max(m.time, m.channel) + number / m.core.bytes_per_cycle
            m.flags[where].append((m.channel + m.core.latency, granules))
            m.bytes += number
            if ends:
                m.copy_words(source, *(m.values[end] for end in ends), number // 4)

        return copy

    def copy_words(self, source, start, stop, words):
        """Words of a table between SMEM and the memory of the operands; unknown ones stay unknown."""
        if start is None or stop is None:
            self.undecided["address of a table"] += 1
            return
        operand, first = self._operand_at(stop if source == "smem" else start)
        if source == "smem":
            if operand is not None:
                known = {first + i: self.memory.get(start + i) for i in range(words)}
                self.written[operand] |= {i: word for i, word in known.items() if word is not None}
            return
        table = self.given.get(operand)
        if table is None and operand in self.operand_names:
            self.unfed[operand] = self.operand_names[operand]
        for i in range(words):
            if table is not None and first + i < len(table):
                self.memory[stop + i] = int(table[first + i]) & MASK
            else:
                self.memory.pop(stop + i, None)

    def _operand_at(self, address):
        """(operand, word in it) of an address in granules; (None, 0) when none is there."""
        for scale in _SCALES:
            index, rest = divmod(address - (_OPERANDS << scale), _OPERAND_SPAN << scale)
            if 0 <= index < _MOST_OPERANDS:
                return index, rest * self.core.granule // 4
        return None, 0

    def _wait(self, flag, size):
        def wait(m):
            where, granules = m.values[flag], m.values[size]
            if where is None or granules is None:
                m.undecided["dma.done.wait"] += 1
                return
            queue, end = m.flags[where], m.time
            if not queue:
                m.unmatched += 1
            while queue and granules > 0:
                done, size_of = queue.popleft()
                end, granules = max(end, done), granules - size_of
                if granules < 0:  # the rest of this copy is waited for later
                    queue.appendleft((done, -granules))
            m.waited += end - m.time
            m.time = end

        return wait

    # Running.

    def _issue(self, first, last):
        """Lets the time pass that bundles first to last - 1 take to issue: each waits for the matrix units that it feeds."""
        time, at = self.time, first
        for bundle in self.feeding[bisect.bisect_left(self.feeding, first): bisect.bisect_left(self.feeding, last)]:
            time, at, fed = time + bundle - at, bundle, self.matmuls[bundle]
            wait = max(self.free[unit] for unit, _ in fed) - time
            if wait > 0:
                self.matmul_waits[bundle] += wait
                time += wait
            for unit, rows in fed:
                self.free[unit] = time + rows
        self.time = time + last - at

    def run(self, limit):
        code, following, values = self.code, self.next, self.values
        count, changes, loops = len(code), [0] * (len(code) + 1), collections.Counter()
        at, target, left, steps = 0, None, 0, 0
        while at < count:
            if target is None and following[at] > at:  # a stretch without scalar work
                changes[at] += 1
                changes[following[at]] -= 1
                self._issue(at, following[at])
                at = following[at]
                continue
            steps += 1
            if steps > limit:
                raise DidNotEnd(f"the program did not end within {limit} steps; bundle {at:#x}.")
            changes[at] += 1
            changes[at + 1] -= 1
            self._issue(at, at + 1)
            functions, commits = code[at]
            jump = None
            for f in functions:
                jump = f(self) if jump is None else f(self) or jump
            for own, web in commits:
                values[web] = values[own]
            if jump is not None:
                target, left = jump, self.core.delay_slots
            elif target is not None:
                left -= 1
            if target is not None and left == 0:
                if target <= at:
                    loops[target, at] += 1
                at, target = target, None
            else:
                at += 1
        return self._result(_running_sum(changes), dict(loops))

    def _result(self, executed, loops):
        return Run(
            cycles=self.time,
            issued=sum(executed),
            dma_wait=self.waited,
            dma_bytes=self.bytes,
            matmul_waits=dict(self.matmul_waits),
            executed=executed,
            loops=loops,
            unknown_loads=dict(self.unknown_loads),
            unknown_ops=dict(self.unknown_ops),
            undecided=dict(self.undecided),
            unfed=tuple(self.unfed[i] for i in sorted(self.unfed)),
            unmatched_waits=self.unmatched,
            results=dict(self.written),
        )


def _allocation(address):
    return next((t[1:] for t in address if t.startswith("#")), "a computed address")


def _running_sum(changes):
    total, sums = 0, []
    for change in changes[:-1]:
        total += change
        sums.append(total)
    return sums
