"""Files on the Hugging Face Hub, downloaded to its cache on this machine.

`huggingface_hub` downloads: it knows the login, the mirror (HF_ENDPOINT) and the cache (HF_HOME), resumes a broken
connection at the byte where it broke, and downloads a file once for all processes of a machine. This module adds what
a run needs: files are fetched in the background before they are read, an outage of minutes is waited for, and every
failure is either a NetworkError, after which a run may continue, or a DataError, which says what to change.
"""

import concurrent.futures
import errno
import logging
import threading
import weakref
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sltrain.data.documents import DataError, NetworkError
from sltrain.log import ANY_RANK, one_line

logger = logging.getLogger(__name__)

RETRIED_STATUS = (408, 425, 429)  # besides all of 5xx
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
AT_ONCE = 4  # files downloaded at the same time
PATIENCE = 3.0  # seconds: a file that takes longer is announced
EXIT_PATIENCE = 2.0  # seconds that the end of the process waits for a thread to remove its half file


@dataclass(frozen=True)
class RetryPolicy:
    """How often and when to request a file again: waits double from first_wait to max_wait seconds. With the defaults a
    dead network ends a run after about 5 minutes, and its start after 30 seconds. huggingface_hub itself resumes a
    broken download up to five times before that."""

    retries: int = 9
    first_wait: float = 1.0
    max_wait: float = 60.0
    timeout: float = 10.0  # seconds without an answer


DEFAULT_RETRY = RetryPolicy()


class _Stopped(Exception):
    """The process ends during a download."""


class Downloads:
    """The files of one revision of a data set repository; `revision` is a commit.

    Every file is downloaded in a daemon thread, AT_ONCE at a time in the order of `start`. May be used by several
    threads.
    """

    def __init__(self, repo: str, revision: str, retry: RetryPolicy = DEFAULT_RETRY) -> None:
        self.repo, self.revision, self.retry = repo, revision, retry
        self._lock = threading.Lock()
        self._running: dict[str, Future[Path]] = {}  # started and not yet asked for
        self._slots = threading.Semaphore(AT_ONCE)
        self._stop, self._threads = threading.Event(), list[threading.Thread]()
        weakref.finalize(self, _shut_down, self._stop, self._threads)

    def start(self, file: str) -> "Future[Path]":
        """Begin to download a file unless that was begun before."""
        with self._lock:
            future = self._running.get(file)
            if future is None or (future.done() and future.exception()):  # the network may be back
                future = self._running[file] = Future()
                thread = threading.Thread(target=self._run, args=(file, future), name="sltrain-download", daemon=True)
                self._threads[:] = [other for other in self._threads if other.is_alive()] + [thread]
                thread.start()
        return future

    def path(self, file: str) -> Path:
        """The file on this machine, downloaded now unless it is in the cache. Raises NetworkError when the retries are
        used up, DataError if the Hub refuses it or the cache cannot hold it."""
        future = self.start(file)
        if not concurrent.futures.wait([future], PATIENCE).done:
            logger.info(f"waiting for {self.repo}/{file} to be downloaded")
        try:
            return future.result()
        finally:
            with self._lock:
                self._running.pop(file, None)

    def check(self, file: str) -> None:
        """Make one small request, unless the file is in the cache. Raises NetworkError or DataError."""
        try:
            is_cached = self._cached(file) is not None
        except ValueError as error:  # a name that no repository can have
            raise hub_error(error, self.repo) from None
        if not is_cached:
            probe(self.repo, file, self.revision, "dataset", self.retry)

    def delete(self, file: str) -> None:
        """Remove a file from the cache, unless it is wanted again already."""
        with self._lock:
            pointer = self._cached(file)
            if file in self._running or pointer is None:
                return
            blob = pointer.parent / pointer.readlink() if pointer.is_symlink() else pointer
            pointer.unlink(missing_ok=True)
            blob.unlink(missing_ok=True)

    def _cached(self, file: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache  # 0.3 s, and needed for this source only

        path = try_to_load_from_cache(self.repo, file, revision=self.revision, repo_type="dataset")
        return Path(path) if isinstance(path, str) else None

    def _run(self, file: str, future: "Future[Path]") -> None:
        with self._slots:
            try:
                future.set_result(self._fetch(file))
            except BaseException as error:
                future.set_exception(error)

    def _fetch(self, file: str) -> Path:
        wait = self.retry.first_wait
        for attempt in range(1, self.retry.retries + 2):
            try:
                return self._download(file)
            except _Stopped:
                raise
            except Exception as error:
                reason = hub_error(error, f"{self.repo}/{file}")
            if isinstance(reason, DataError):
                raise reason
            if attempt > self.retry.retries:
                raise NetworkError(f"{reason}; gave up after {attempt} attempts")
            logger.warning(f"{reason}; retry {attempt} of {self.retry.retries} in {wait:g} s", extra=ANY_RANK)
            self._stop.wait(wait)
            wait = min(2 * wait, self.retry.max_wait)
        raise AssertionError("the last attempt returns or raises")

    def _download(self, file: str) -> Path:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

        where: dict[str, Any] = {"repo_type": "dataset", "revision": self.revision}
        if (cached := self._cached(file)) is not None:
            return cached
        # hf_hub_download retries this request for half a minute by itself, without saying so.
        get_hf_file_metadata(hf_hub_url(self.repo, file, **where), timeout=self.retry.timeout)
        return Path(hf_hub_download(self.repo, file, **where, tqdm_class=_stoppable_bar(self._stop)))


def probe(
    repo: str, file: str, revision: str | None = None, repo_type: str = "model", retry: RetryPolicy = DEFAULT_RETRY
) -> None:
    """Ask the Hub for a file's size, twice at most. Raises NetworkError or DataError."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    for attempt in range(2):
        try:
            url = hf_hub_url(repo, file, repo_type=repo_type, revision=revision)
            get_hf_file_metadata(url, timeout=retry.timeout)
            return
        except Exception as error:
            reason = hub_error(error, f"{repo}/{file}")
        if attempt or isinstance(reason, DataError):
            raise reason
        threading.Event().wait(retry.first_wait)


def hub_error(error: Exception, what: str) -> DataError | NetworkError:
    """What an exception of huggingface_hub, datasets or their HTTP library means for a run that wants `what`."""
    from huggingface_hub import errors

    if isinstance(error, DataError | NetworkError):
        return error
    chain = _causes(error)
    status = next((e.response.status_code for e in chain if isinstance(e, errors.HfHubHTTPError)), None)
    login = "log in (hf auth login, or HF_TOKEN=...)"
    for kind, words in [
        (errors.GatedRepoError, f"access is gated; accept its terms on the Hub and {login}"),
        (
            errors.RepositoryNotFoundError,
            f"the Hub has no such repository, or it is private: check the name, or {login}",
        ),
        (errors.RevisionNotFoundError, "there is no such revision; check it, or leave it out"),
        (errors.RemoteEntryNotFoundError, "there is no such file in this revision; check both"),
        (errors.HFValidationError, "this is not the name of a repository (OWNER/NAME)"),
    ]:
        if any(isinstance(e, kind) for e in chain):
            return DataError(f"{what}: {words}")
    if status is not None and 400 <= status < 500 and status not in RETRIED_STATUS:
        return DataError(f"{what}: the Hub refuses the request (HTTP {status})" + f"; {login}" * (status in (401, 403)))
    local = next((e for e in chain if isinstance(e, OSError) and (e.filename or e.errno in DISK_FULL)), None)
    if local is not None:
        return DataError(
            f"{what}: the Hub's cache cannot hold it ({local.strerror}); make room, or name another folder with HF_HOME"
        )
    cause = f"the server answered {status}" if status else named(chain[-1])
    return NetworkError(f"cannot reach {what} on the Hub: {cause}")


def is_of_network(error: BaseException) -> bool:
    """Whether a request that failed is among an exception's causes."""
    from huggingface_hub.errors import HfHubHTTPError

    kinds = (ConnectionError, TimeoutError, HfHubHTTPError)
    return any(isinstance(e, kinds) or type(e).__module__.startswith("httpx") for e in _causes(error))


def _causes(error: BaseException) -> list[BaseException]:
    """An exception and the exceptions that led to it, the first cause last."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def named(error: BaseException) -> str:
    """The type of an error, whose message alone may say little, and what it says."""
    name, text = type(error).__name__, one_line(error)
    return name if text == name else f"{name}: {text}"


def _stoppable_bar(stop: threading.Event) -> Any:
    """A class of progress bars that draw nothing, and end the download they belong to when `stop` is set."""
    from tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, name: str = "", **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if stop.is_set():
                raise _Stopped
            return super().update(n)

    return Bar


def _shut_down(stop: threading.Event, threads: list[threading.Thread]) -> None:
    """Runs when the process ends, so that no half file is left in the cache."""
    stop.set()
    for thread in threads:
        if thread is not threading.current_thread():  # which may be the last to know of these downloads
            thread.join(EXIT_PATIENCE)
