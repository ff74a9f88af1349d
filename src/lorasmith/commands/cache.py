"""`lorasmith cache`: what the cache folder holds, and removing some of it.

    lorasmith cache ls
    lorasmith cache prune --older-than 30d --max-size 10GB

Only files that lorasmith wrote are listed and removed. A run that reads the cache at the moment goes on: it encodes
again what it misses.
"""

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorasmith.cache_folder import (
    CachedFile,
    cached_files,
    choose_unwanted,
    default_place,
    in_words,
    remove,
    require_cache,
)
from lorasmith.config import CacheConfig, bytes_of, seconds_of
from lorasmith.errors import UserError


def run(cfg: CacheConfig) -> int:
    """List or prune; return the exit code: 0, or 1 when something that is in use had to stay."""
    if cfg.action is None:
        raise UserError("missing: ls or prune. For example: lorasmith cache ls")
    place = cfg.cache_dir or default_place()
    require_cache(place)
    files = [file for file in cached_files(place) if cfg.kind in (None, file.kind)]
    if cfg.action == "prune":
        return _prune(cfg, files)
    parts = _parts(place, files)
    print(json.dumps({"path": str(place), "parts": parts}, indent=2) if cfg.as_json else _page(place, parts))
    return 0


def _parts(place: Path, files: Sequence[CachedFile]) -> list[dict[str, Any]]:
    """Return what is known of each model part, and of facts together, for programs."""
    groups: dict[tuple[str, str], list[CachedFile]] = defaultdict(list)
    for file in files:
        groups[file.kind, file.part].append(file)
    return [
        {
            "kind": kind,
            "part": part,
            "models": sorted({file.model for file in own if file.model}),
            "entries": sum(file.num_entries for file in own),
            "files": len(own),
            "bytes": sum(file.size for file in own),
            "last_used": max(file.last_used for file in own),
            "path": str(place / kind / part),
        }
        for (kind, part), own in groups.items()
    ]


def _page(place: Path, parts: Sequence[dict[str, Any]]) -> str:
    lines = [f"cache folder {place}: {in_words(sum(part['bytes'] for part in parts))}"]
    for part in parts:
        name = "of pictures and models" if part["kind"] == "facts" else "damaged, or of another version"
        if part["models"]:
            name = f"made by {', '.join(part['models'])}"
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(part["last_used"]))
        lines.append(
            f"  {part['kind']:<8}{part['entries']:>10,} entries  {in_words(part['bytes']):>9}  last used {when}  "
            f"{name}  {part['path']}"
        )
    return "\n".join(lines)


def _prune(cfg: CacheConfig, files: Sequence[CachedFile]) -> int:
    older_than = None if cfg.older_than is None else seconds_of(cfg.older_than)
    max_size = None if cfg.max_size is None else bytes_of(cfg.max_size)
    unwanted = choose_unwanted(files, now=time.time(), older_than=older_than, max_size=max_size)
    in_use = [] if cfg.dry_run else remove(unwanted)
    gone = [file for file in unwanted if file not in in_use]
    print(
        f"{'would remove' if cfg.dry_run else 'removed'} {sum(file.num_entries for file in gone):,} entries in "
        f"{len(gone):,} files, {in_words(sum(file.size for file in gone))}; "
        f"{in_words(sum(file.size for file in files) - sum(file.size for file in gone))} left"
    )
    for file in in_use:
        print(f"in use, and left: {file.path}")
    return 1 if in_use else 0
