"""`python -m headspring`, for launchers that start a module (`torchrun -m headspring`)."""

from headspring.cli import main

main()
