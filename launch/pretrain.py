"""Pretrain: `deepspeed [launcher flags] launch/pretrain.py --config FILE.yaml [--section.key value ...]`."""

from megamult.train.pretrain import main

if __name__ == "__main__":
    main()
