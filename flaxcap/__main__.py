"""`python -m flaxcap` is the `flaxcap` program."""

from flaxcap.commands.main import run

if __name__ == "__main__":
    run()
