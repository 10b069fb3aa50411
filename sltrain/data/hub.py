"""Shards of a data set on the Hugging Face Hub, read while they are downloaded.

`huggingface_hub` gives the address, the login and the HTTP client; a shard is then fetched in ranges of 4 MB, so that
no connection stays open between two blocks of documents (a shard of C4 lasts for hours of training). A connection
that is cut, refused or silent is taken up again at the byte where it broke: the decompressor above does not notice,
nothing is read twice and nothing is lost.

Why not `datasets.load_dataset(streaming=True)`: its JSON reader (measured with 5.2.0) ends at one bad record and loses
the 10 MB around it, a shuffled stream does not resume exactly, retries and waits are module constants, and opening it
takes a dozen requests for metadata. Without its reader, what remains is one HTTP request, which is made here.
"""

import io
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO, cast

from sltrain.data.documents import BadData, DataError, Document, NetworkError
from sltrain.data.records import read_documents
from sltrain.log import ANY_RANK

logger = logging.getLogger(__name__)

RETRIED_STATUS = (408, 425, 429)  # besides all of 5xx


@dataclass(frozen=True)
class RetryPolicy:
    """How long to bear with a network: the waits double from first_wait to max_wait seconds; a byte received starts
    the count again.

    With the defaults a dead network is given up after about 5 minutes in the middle of a run, and after 30 seconds at
    its start.
    """

    retries: int = 9
    first_wait: float = 1.0
    max_wait: float = 60.0
    timeout: float = 10.0  # seconds without one byte, or for a connection
    start_retries: int = 1
    range_bytes: int = 4 << 20

    def wait_before(self, attempt: int) -> float:
        """Seconds to wait before retry number `attempt` (1, 2, ...)."""
        return min(self.first_wait * 2 ** (attempt - 1), self.max_wait)


DEFAULT_RETRY = RetryPolicy()


class HubFiles:
    """One split of a data set repository as a source, one shard a file.

    `file_template` names a file with {shard} and {num_shards}, as in
    "en/c4-train.{shard:05d}-of-{num_shards:05d}.json.gz"; `revision` is a commit, so that the corpus cannot change
    under a run. Only shards that are asked for are read.
    """

    def __init__(
        self,
        repo: str,
        revision: str,
        file_template: str,
        num_shards: int,
        on_bad_data: str = "skip",
        retry: RetryPolicy | None = None,
    ) -> None:
        if num_shards < 1:
            raise ValueError(f"{repo}: the number of shards is {num_shards}; it must be at least 1")
        try:
            self.files = [file_template.format(shard=shard, num_shards=num_shards) for shard in range(num_shards)]
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"{file_template!r} is no file template: it may use {{shard}} and {{num_shards}} ({error})"
            ) from None
        if self.files[0].endswith(".parquet"):
            raise ValueError(
                f"{file_template}: parquet shards cannot be streamed; download them and use data=local path=GLOB"
            )
        self.name = f"{repo}/{file_template}"
        self.num_shards = num_shards
        self.repo = repo
        self.revision = revision
        self.bad = BadData(on_bad_data)
        self.retry = retry or DEFAULT_RETRY

    def fingerprint(self) -> str:
        return f"{self.repo}@{self.revision}, {self.num_shards} shards, first {self.files[0]}"

    def shard_name(self, shard: int) -> str:
        return f"{self.repo}/{self.files[shard]}"

    def shard_sizes(self) -> list[int]:
        return [1] * self.num_shards  # the Hub's data sets are cut evenly

    def check(self) -> None:
        """One small request; NetworkError if the Hub cannot be reached, DataError if it has no such file."""
        try:
            self._open(0).probe()
        except NetworkError as error:
            raise NetworkError(f"{error}; check the connection, or use data=local path=GLOB or data=stdlib") from None

    def documents(self, shard: int, start: int = 0, step: int = 1, offset: int = 0) -> Iterator[Document]:
        def opener() -> BinaryIO:
            return cast(BinaryIO, io.BufferedReader(self._open(shard), 1 << 16))

        return read_documents(opener, self.shard_name(shard), self.bad, start, step, offset)

    def _open(self, shard: int) -> "HubFile":
        import huggingface_hub  # 0.3 s, and needed for this source only

        url = huggingface_hub.hf_hub_url(self.repo, self.files[shard], repo_type="dataset", revision=self.revision)
        return HubFile(url, self.shard_name(shard), self.retry)


class HubFile(io.RawIOBase):
    """The bytes behind a URL as a file that is read once from front to back, whatever the network does."""

    def __init__(self, url: str, name: str, retry: RetryPolicy) -> None:
        self.url = url
        self.name = name  # what messages call it
        self.retry = retry
        self._size: int | None = None  # known after the first response
        self._fetched = 0  # bytes received since the beginning
        self._block = memoryview(b"")  # what was received and not yet read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        if not self._block and (self._size is None or self._fetched < self._size):
            self._block = memoryview(self._fetch())
        count = min(len(buffer), len(self._block))
        buffer[:count] = self._block[:count]
        self._block = self._block[count:]
        return count

    def probe(self) -> None:
        """Ask for one byte with little patience; raises NetworkError or DataError."""
        for attempt in range(self.retry.start_retries + 1):
            try:
                next(self.request(0, 1), None)
                return
            except ConnectionError as error:
                lost = error
                if attempt < self.retry.start_retries:
                    time.sleep(self.retry.first_wait)
        raise NetworkError(f"cannot reach {self.url}: {lost}")

    def _fetch(self) -> bytes:
        """The next range_bytes of the file (fewer at its end), through as many connections as it takes."""
        block = bytearray()
        attempts = 0
        while (missing := self.retry.range_bytes - len(block)) > 0 and self._fetched != self._size:
            try:
                for chunk in self.request(self._fetched, missing):
                    block += chunk
                    self._fetched += len(chunk)
                    attempts = 0
            except ConnectionError as error:
                attempts += 1
                if attempts > self.retry.retries:
                    raise NetworkError(
                        f"lost the connection to {self.url} and gave up after {attempts} attempts: {error}"
                    ) from None
                wait = self.retry.wait_before(attempts)
                logger.warning(
                    f"{self.name}: {error}; trying again at byte {self._fetched:,} in {wait:g} s "
                    f"({attempts} of {self.retry.retries})",
                    extra=ANY_RANK,
                )
                time.sleep(wait)
        return bytes(block)

    def request(self, first: int, count: int) -> Iterator[bytes]:
        """Make one request for bytes first .. first + count - 1 and yield them as they come.

        Raises ConnectionError for whatever another attempt may mend (network errors, silence, an early end, 5xx),
        DataError for what it may not (4xx).
        """
        from huggingface_hub import get_session
        from huggingface_hub.utils import build_hf_headers

        headers = build_hf_headers() | {"Range": f"bytes={first}-{first + count - 1}", "Accept-Encoding": "identity"}
        try:
            with get_session().stream(
                "GET", self.url, headers=headers, timeout=self.retry.timeout, follow_redirects=True
            ) as response:
                self._check_status(response.status_code)
                if response.status_code == 416:  # nothing behind `first`: the file ends here
                    self._size = first
                    return
                skip, expected = self._read_extent(response.status_code, response.headers, first, count)
                for chunk in response.iter_raw():
                    useful = chunk[skip:][:expected]
                    skip -= min(skip, len(chunk))
                    expected -= len(useful)
                    if useful:
                        yield useful
                    if expected == 0:
                        return
        except DataError:
            raise
        except (
            Exception
        ) as error:  # only the HTTP library runs above, and its errors change their family between its releases
            raise ConnectionError(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from error
        if expected > 0:
            raise ConnectionError(f"the server ended {expected:,} bytes too early")

    def _check_status(self, status: int) -> None:
        if status in (200, 206, 416):
            return
        if status >= 500 or status in RETRIED_STATUS:
            raise ConnectionError(f"the server answered {status}")
        reasons = {401: "a login is needed", 403: "access is refused", 404: "there is no such file or revision"}
        reason = reasons.get(status, "the server refuses the request")
        raise DataError(f"{self.url}: {reason} (HTTP {status}); check its name and revision")

    def _read_extent(self, status: int, headers: Mapping[str, str], first: int, count: int) -> tuple[int, int]:
        """Learn the size of the file; return (bytes to skip, bytes to take) of this response.

        A server that knows no ranges answers 200 with the whole file; then the part before `first` is skipped.
        """
        if status == 206:
            self._size = int(headers["Content-Range"].rpartition("/")[2])
            return 0, min(count, self._size - first)
        self._size = int(headers["Content-Length"])
        return first, min(count, self._size - first)
