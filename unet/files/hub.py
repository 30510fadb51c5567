"""Downloading models from the Hugging Face hub."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from unet.files.errors import LoadError, shown

WAITS = (1.0, 4.0, 10.0)
"""Seconds to wait before each further attempt at a request that the hub refuses for now. With the client's time limit of ten
seconds for each, a hub that goes on refusing is given up within a minute."""

# The client makes names of files of both.
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ETAG = re.compile(r"[0-9A-Za-z_-]{1,128}")


class Repository:
    """A model on the hub: `owner/name`, or `owner/name@revision`.

    Raises `LoadError`, as all of its methods do, for names that lead elsewhere, for what the hub does not have, and if the hub
    cannot be reached or gives answers that make no sense. `wait` sleeps between attempts.
    """

    def __init__(self, where: str, wait: Callable[[float], None] = time.sleep):
        self._where = shown(where)
        self._name, _, revision = where.partition("@")
        self._revision = revision or None
        self._wait = wait
        self._unreachable = ""
        if not all(map(is_plain_name, revision.split("/") if revision else ())):
            raise LoadError(f"hub:{self._where} names a revision that is no branch, tag or commit")

    def first(self, wanted: Sequence[str]) -> Path:
        """The path of the first of the files `wanted` that there is, downloaded unless it is cached."""
        names = " or ".join(map(shown, wanted))
        for file in wanted:
            path = self._fetched(file, names)
            if path is not None:
                return path
        if self._unreachable:
            raise LoadError(f"hub:{self._where} is not cached and the hub cannot be reached ({self._unreachable})")
        raise LoadError(f"hub:{self._where} has no {names} for you on the hub")

    def optional(self, file: str) -> Path | None:
        """The path of a file, downloaded unless it is cached; None where there is none."""
        return self._fetched(file, shown(file))

    def _fetched(self, file: str, names: str) -> Path | None:
        """As `optional`; `names` are the files that an error is about."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        if not is_plain_name(file):
            raise LoadError(f"hub:{self._where} names {shown(file)}, which is no file beside the others")
        try:
            online = self._answers_for(file)
            path = HfApi().hf_hub_download(self._name, file, revision=self._revision, local_files_only=not online)
        except HFValidationError as error:
            raise LoadError(f"hub:{self._where} is not the name of a repository of the hub ({_line(error)})") from None
        except LocalEntryNotFoundError as error:
            self._unreachable = self._unreachable or _line(error)
            return None
        except EntryNotFoundError:
            return None
        except HfHubHTTPError as error:
            raise LoadError(f"hub:{self._where} has no {names} for you on the hub ({_line(error)})") from None
        # Answers that do not fit together, in the client's words. Errors of the system have a number.
        except (ValueError, OSError) as error:
            if getattr(error, "errno", None) is not None:
                raise
            raise LoadError(f"hub:{self._where}: {file} cannot be downloaded ({_line(error)})") from None
        return Path(path)

    def _answers_for(self, file: str) -> bool:
        """Whether the hub can be asked for a file now. Its answer is checked before the client makes names of files of it."""
        import httpx2
        from huggingface_hub import HfApi, hf_hub_url
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled

        url = hf_hub_url(self._name, file, revision=self._revision)
        for wait in (*WAITS, None):
            try:
                found = HfApi().get_hf_file_metadata(url=url)
            except EntryNotFoundError:
                raise
            except HfHubHTTPError as error:
                status = error.response.status_code
                if status not in (408, 429) and status < 500:
                    return True  # the client says why, or has the file cached
                self._unreachable = f"it answers {status}"
                if wait is None:
                    return False
                self._wait(wait)
            except (OfflineModeIsEnabled, httpx2.HTTPError) as error:
                self._unreachable = _line(error)
                return False
            else:
                if not _COMMIT.fullmatch(found.commit_hash or "") or not _ETAG.fullmatch(found.etag or ""):
                    raise LoadError(
                        f"hub:{self._where}: the answer for {file} names no commit or no version of the file: it is not from a "
                        "Hugging Face hub (is HF_ENDPOINT right?)"
                    )
                return True
        return False


def is_plain_name(name: str) -> bool:
    """Whether this is the name of a file in a folder, and leads nowhere else."""
    return name not in ("", ".", "..") and name.isprintable() and not set(name) & set('/\\:"') and len(name) <= 200


def _line(error: Exception) -> str:
    """The first line of an error."""
    return shown(next(iter(str(error).strip().splitlines()), type(error).__name__), 200)
