"""``python -m mogle_rt`` is ``mogle-rt``."""

from mogle_rt.apps.cli import main

if __name__ == "__main__":
    main()
