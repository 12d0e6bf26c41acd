"""Pretrain: `deepspeed [launcher flags] launch/pretrain.py --config FILE.yaml [--section.key value ...]`."""

from megamult.runtime.console import interruptible

if __name__ == "__main__":
    with interruptible():
        from megamult.train.pretrain import main

        main()
