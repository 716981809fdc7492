"""``python -m mmcompress``, which is what torchrun and accelerate launch start."""

from mmcompress.cli import main

if __name__ == "__main__":
    main()
