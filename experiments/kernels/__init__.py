"""The kernel benchmark: ours and each rival, on the hardware at hand or by the TPU compiler's schedule (`experiments.bench kernels`)."""
