"""`python -m zsq_ext.cli`: the command `zsq` where its script is not on the path."""

from zsq_ext.cli import main

main()
