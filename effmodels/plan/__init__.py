"""What the TPU compiler says about a program, on a machine without a TPU."""
