"""``python -m bench``."""

import sys

try:
    from bench.cli import main
except ImportError as error:
    if "another package called 'datasets'" not in str(error):
        raise
    print(f"bench: {error}", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main())
