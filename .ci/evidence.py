"""Run the experiments of nbs/11_evaluation.ipynb that the table of results lacks."""
import sys

from blt_nb.evaluation import main

if __name__ == "__main__":  # the workers import this file too
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nstopped; `make evidence` goes on from here")
