"""``python -m deploy`` does what ``effdeploy`` does."""

from deploy.cli import main

if __name__ == "__main__":
    main()
