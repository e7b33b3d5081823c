"""What the simulator assumes of a core of each TPU generation."""
import dataclasses


@dataclasses.dataclass(frozen=True)
class Core:
    """One core. `calibrated`: compared with timings of real chips (tests/plan/test_calibration.py)."""

    delay_slots: int  # bundles that still run after a branch
    granule: int  # bytes; the unit of copies
    bytes_per_cycle: float  # HBM bandwidth of the chip / cores / clock
    latency: int  # cycles from the end of a copy's transfer to its flag: a guess, not a published figure
    megahertz: float  # peak bf16 FLOP/s / cores / (4 MXUs x 2 x 128^2); of v6e: that of v5p
    cores: int
    calibrated: bool
    matrix_units: int  # of 128 x 128, each fed one row of 128 a cycle; 0: not modelled (v6e's are 256 x 256)


CORES = {
    "v4": Core(1, 512, 585.0, 700, 1050.0, 2, True, 4),  # 1228 GB/s / 2 / 1050 MHz
    "v5p": Core(4, 32, 790.0, 700, 1751.0, 2, False, 4),  # 2765 GB/s / 2 / 1751 MHz
    "v5e": Core(4, 32, 545.0, 700, 1503.0, 1, False, 4),  # 819 GB/s / 1503 MHz
    "v6e": Core(4, 32, 937.0, 700, 1751.0, 1, False, 0),  # 1640 GB/s / 1751 MHz
}
