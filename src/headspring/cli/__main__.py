"""`python -m headspring.cli`, for launchers that start a module (`torchrun -m`)."""

from headspring.cli import main

main()
