"""`python -m ablation.cli` runs `ablation`."""

from ablation.cli import main

main()
