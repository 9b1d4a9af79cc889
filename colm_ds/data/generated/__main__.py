"""`python -m colm_ds.data.generated FOLDER`."""

from __future__ import annotations

from colm_ds.data.generated.mixture import main

main()
