"""The console script `symbnn`, and `python -m symbnn`. What needs no torch is answered before torch is imported."""
import sys


def main() -> int:
    """Run a command; its exit status."""
    if sys.argv[1:] == ["reproduce", "--list"]:
        from symbnn.studies.titles import listing

        print(listing())
        return 0
    from symbnn.errors import Refusal

    try:
        from symbnn.cli import main as command
    except Refusal as refusal:  # says what to install
        print(f"symbnn: {refusal}", file=sys.stderr)
        return 2
    return command()


if __name__ == "__main__":
    sys.exit(main())
