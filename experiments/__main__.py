"""List the experiments: ``python -m experiments``."""

import ast
import sys
from pathlib import Path


def summaries() -> dict[str, str]:
    """First line of each experiment's docstring by name, read without importing anything."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*/__init__.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[path.parent.name] = text.partition("\n")[0]
    return found


def main() -> int:
    """Print one line an experiment."""
    if len(sys.argv) > 1 and sys.argv[1] not in ("-h", "--help"):
        print(f"error: no experiment '{sys.argv[1]}'; run python -m experiments.<name>", file=sys.stderr)
        return 2
    print("usage: python -m experiments.<name> [reproduce | fit | validate | test | predict | export] [--help]\n")
    for name, text in summaries().items():
        print(f"  {name:<16}{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
