"""PID 1 of every sandbox: `python3 -I -S -u /.rethaw/lib/rethaw/guest/guestd.py`, or `-m rethaw.guest.guestd`.

Only a launcher, so that everything else is loaded from byte code. See `rethaw.guest.daemon`.
"""

import sys

if not __package__:
    here = __file__.rsplit("/", 1)[0]
    sys.path[:] = [here.rsplit("/", 2)[0], *(p for p in sys.path if p != here)]

from rethaw.guest.daemon import main

if __name__ == "__main__":
    main()
