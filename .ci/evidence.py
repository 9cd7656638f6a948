"""Run the experiments of nbs/11_evaluation.ipynb that the table of results lacks."""
import signal
import sys

from blt_nb.evaluation import main

if __name__ == "__main__":  # the workers import this file too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the workers end too
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nstopped; `make evidence` goes on from here")
