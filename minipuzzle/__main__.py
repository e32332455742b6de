"""``python -m minipuzzle``: the command line, for torchrun and wherever the script is not on the path."""

from minipuzzle.commands.cli import main

main()
