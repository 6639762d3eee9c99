"""``python -m sem_timm`` is ``sem-timm``."""

import sys

from sem_timm.command_line import main

if __name__ == '__main__':
    sys.exit(main())
