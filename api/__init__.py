"""The HTTP service. It imports the worker's front desk and the torch-free part of `ablation` only."""
