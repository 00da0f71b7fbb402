"""The counter: HTTP in, HTTP out. Imports the worker's front desk and the torch-free part of `ablation` only."""
