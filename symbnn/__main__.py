"""`python -m symbnn` is the command `symbnn`."""
from symbnn.cli import main

if __name__ == "__main__":
    main()
