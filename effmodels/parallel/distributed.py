"""Many processes: one config block joins them (`jax.distributed`), and says in one sentence who is missing.

A TPU pod, SLURM and MPI tell jax who takes part; elsewhere the address, the number and the rank are given.
"""
import contextlib
import dataclasses
import glob
import os
import re
import sys
import threading

import jax

from effmodels.config import ConfigError, build

MODES = ("auto", "on", "off")
_GRACE = 60  # seconds by which the runtime's own limit is later than ours
# Variables in which a scheduler says how many processes there are.
_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@dataclasses.dataclass(frozen=True)
class Distributed:
    """The `distributed` section of a run's config.

    mode: "on" joins, "off" does not, "auto" joins where the surroundings (or `coordinator`) say that there are several processes.
    coordinator: host:port of process 0; None: what the surroundings say. timeout: seconds to wait for the others.
    """

    mode: str = "auto"
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    timeout: int = 300

    def __post_init__(self):
        if self.mode not in MODES:
            raise ConfigError(f"distributed.mode: expected one of {', '.join(MODES)}, got {self.mode!r}.")
        given = {"num_processes": self.num_processes, "process_id": self.process_id}
        missing = [name for name, value in given.items() if value is None]
        if self.coordinator is not None and missing:
            raise ConfigError(
                f"distributed: with a coordinator ({self.coordinator}) every process needs "
                f"distributed.{' and distributed.'.join(missing)}; start process i of n with num_processes=n, process_id=i."
            )
        if self.coordinator is None and len(missing) < 2:
            raise ConfigError(f"distributed: {', '.join(f'{k}={v}' for k, v in given.items() if v is not None)} without a coordinator; "
                              "give distributed.coordinator=host:port of process 0.")
        if self.coordinator is not None and not re.fullmatch(r".+:\d+", self.coordinator):
            raise ConfigError(f"distributed.coordinator: expected host:port, got {self.coordinator!r}.")
        if self.coordinator is not None and not 0 <= self.process_id < self.num_processes:
            raise ConfigError(f"distributed: process_id={self.process_id} must be in 0 .. {self.num_processes - 1}.")
        if self.timeout < 1:
            raise ConfigError(f"distributed.timeout: expected at least one second, got {self.timeout}.")


def start(config=None):
    """Joins the processes of a run, before any device is touched; True if it did.

    config: a `Distributed` or its mapping. When the others do not come within the timeout, the process ends with one sentence.
    """
    config = build(Distributed, {} if config is None else config, "config.distributed")
    if config.mode == "off" or jax.distributed.is_initialized():
        return False
    pod = tpu_is_here()
    if config.mode == "auto" and config.coordinator is None and not (several_processes() or pod):
        return False
    with _watch(config):
        try:
            jax.distributed.initialize(
                config.coordinator, config.num_processes, config.process_id, initialization_timeout=config.timeout + _GRACE
            )
        except ValueError as error:  # jax recognises no cluster around it
            if config.mode == "auto" and config.coordinator is None and pod:
                return False  # a TPU outside of a pod; `check_joined` sees to it that no pod gets past here
            raise ConfigError(f"distributed.mode={config.mode!r}: jax finds no cluster here ({error}); give distributed.coordinator, "
                              "num_processes and process_id.") from None
    return True


@contextlib.contextmanager
def _watch(config):
    """Ends the process with one sentence when the others have not come in time: the runtime itself aborts with a stack trace."""

    def give_up():
        me = f"process {config.process_id} of {config.num_processes}" if config.coordinator else "this process"
        at = config.coordinator or "the coordinator that the surroundings name"
        print(
            f"error: distributed: {me} waited {config.timeout} s at {at}, and not every process came; missing are those that do not print "
            "this line. Start all of them with the same coordinator and num_processes, see that the address can be reached, or raise "
            "distributed.timeout.",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(1)

    timer = threading.Timer(config.timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def several_processes():
    """Whether the surroundings speak of more than one process: a scheduler's count, a TPU pod's host names, or a coordinator's address."""
    if any(int(os.environ.get(name) or 1) > 1 for name in _COUNTS):
        return True
    if os.environ.get("JAX_COORDINATOR_ADDRESS") or os.environ.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return True
    return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")


def tpu_is_here():
    """Whether this machine has TPU chips that jax may use: then jax asks the pod's metadata who takes part."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return ("tpu" in platforms or not platforms) and bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


def check_joined():
    """ConfigError when devices of other processes are here but the processes have not joined: a TPU pod started without telling so."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ConfigError(
            f"distributed: the devices belong to {jax.process_count()} processes that have not joined; set distributed.mode=on (a TPU pod "
            "needs nothing else)."
        )

