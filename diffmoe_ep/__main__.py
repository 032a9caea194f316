"""`python -m diffmoe_ep` is the command `diffmoe`."""

from diffmoe_ep.cli import main

if __name__ == "__main__":
    main()
