"""The feature cache of a run: --cache, --no-cache, or the user's cache folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .errors import CommandError

if TYPE_CHECKING:
    from ..encoders import FeatureCache


def check_cache_options(cache: Path | None, no_cache: bool) -> None:
    """Refuse both at once."""
    if cache is not None and no_cache:
        raise CommandError("--cache and --no-cache exclude each other")


def open_cache(cache: Path | None, no_cache: bool) -> FeatureCache | Literal[False]:
    """The cache to use, or False for none.

    A folder that was asked for has to be writable. The user's cache folder is not asked for: where it cannot be
    written to, one line on stderr says so and the run goes on without.
    """
    from ..matchers.default import user_cache_folder, writable_cache

    check_cache_options(cache, no_cache)
    if no_cache:
        return False
    try:
        return writable_cache(user_cache_folder() if cache is None else cache)
    except OSError as error:
        reason = (error.strerror or str(error)).removeprefix("FeatureCache: ")
        if cache is not None:
            raise CommandError(f"--cache {cache}: {reason}") from error
        print(f"note: features are not kept: {reason}; --cache DIR keeps them elsewhere", file=sys.stderr)
        return False


def short_path(path: Path) -> str:
    """A path with ~ for the user's folder: reports are passed on."""
    try:
        return str(Path("~") / path.relative_to(Path.home()))
    except (ValueError, RuntimeError):  # not in it, or there is none
        return str(path)
