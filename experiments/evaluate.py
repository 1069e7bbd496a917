"""Runs one benchmark with one method and one model: the same as `adapttoken evaluate`.

    python -m experiments.evaluate --flagfile=experiments/configs/qwen2.5-vl-7b/adapttoken.cfg --benchmark=videomme \\
        --data=/data/Video-MME --model=/models/Qwen2.5-VL-7B-Instruct --workdir=runs/videomme_adapttoken
"""

import sys

from adapttoken_jax import cli

if __name__ == "__main__":
    sys.exit(cli.main(["evaluate", *sys.argv[1:]]))
