"""`python -m gradwatch.cli`: how the launcher starts its own children."""

from gradwatch.cli.main import run

if __name__ == "__main__":
    run()
