"""`python -m nlscale` is `nlscale`."""

from nlscale.cli import main

if __name__ == "__main__":
    main()
