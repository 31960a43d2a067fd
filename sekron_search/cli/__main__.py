"""`python -m sekron_search.cli`."""

from sekron_search.cli import main

main()
