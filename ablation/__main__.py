"""`python -m ablation` runs the command line, `ablation`."""

from ablation.cli import main

main()
