"""`python -m coatrt`."""

from coatrt.cli.main import main

main()
