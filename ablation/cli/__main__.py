"""`python -m ablation.cli` is `ablation`."""

from ablation.cli import main

main()
