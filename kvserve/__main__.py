"""`python -m kvserve` is `kvserve`."""

from kvserve.cli.main import main

main()
