"""The console script `symbnn`, and `python -m symbnn`. What needs no torch is answered before torch is imported."""
import sys

from symbnn.signals import CLOSED, output_is_closed


def main() -> int:
    """The console script: run a command. Gives its exit status; 141 where the reader of its output has gone."""
    try:
        status = _answer_quickly() if sys.argv[1:] == ["reproduce", "--list"] else _command()
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        if not output_is_closed():
            raise
        return CLOSED
    except KeyboardInterrupt:  # while torch is imported
        print("\nInterrupted. Nothing was written.", file=sys.stderr)
        return 130


def _answer_quickly() -> int:
    from symbnn.studies.titles import listing

    print(listing())
    return 0


def _command() -> int:
    from symbnn.errors import Refusal

    try:
        from symbnn.cli import main as command
    except Refusal as refusal:  # says what to install
        print(f"symbnn: {refusal}", file=sys.stderr)
        return 2
    return command()


if __name__ == "__main__":
    sys.exit(main())
