"""Shards of a data set on the Hugging Face Hub, read while they are downloaded.

`huggingface_hub` supplies the address, the login and the HTTP client. A shard is fetched in ranges of 4 MB, so no
connection stays open between two blocks of documents (a shard of C4 lasts for hours of training). After a connection
is cut, refused or silent, the download resumes at the byte where it broke: the decompressor does not notice, nothing
is read twice and nothing is lost.

Why not `datasets.load_dataset(streaming=True)`: its JSON reader (measured with 5.2.0) stops at one bad record and
loses the 10 MB around it, a shuffled stream does not resume exactly, retries and waits are module constants, and
opening it takes a dozen requests for metadata. Without its reader, one HTTP request remains, which is made here.
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
REFUSALS = {401: "a login is needed", 403: "access is refused", 404: "there is no such file or revision"}


@dataclass(frozen=True)
class RetryPolicy:
    """How often and when to retry: waits double from first_wait to max_wait seconds; every byte received resets the
    count. With the defaults a dead network ends a run after about 5 minutes, and its start after 30 seconds."""

    retries: int = 9
    first_wait: float = 1.0
    max_wait: float = 60.0
    timeout: float = 10.0  # seconds without one byte, or for a connection
    start_retries: int = 1
    range_bytes: int = 4 << 20


DEFAULT_RETRY = RetryPolicy()


@dataclass(eq=False)
class HubFiles:
    """One split of a data set repository as a source, one shard a file. Raises ValueError for a wrong template or
    number of shards."""

    repo: str  # such as allenai/c4
    revision: str  # a commit, so that the corpus cannot change during a run
    file_template: str  # as in "en/c4-train.{shard:05d}-of-{num_shards:05d}.json.gz"
    num_shards: int
    on_bad_data: str = "skip"
    retry: RetryPolicy | None = None  # None: DEFAULT_RETRY

    def __post_init__(self) -> None:
        if self.num_shards < 1:
            raise ValueError(f"{self.repo}: the number of shards is {self.num_shards}; it must be at least 1")
        template = self.file_template
        try:
            self.files = [template.format(shard=i, num_shards=self.num_shards) for i in range(self.num_shards)]
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"{template!r} is not a file template: it may use {{shard}} and {{num_shards}} ({error})"
            ) from None
        if template.endswith(".parquet"):
            raise ValueError(
                f"{template}: parquet shards cannot be streamed; download them and use data=local path=GLOB"
            )
        self.name = f"{self.repo}/{template}"
        self.bad = BadData(self.on_bad_data)

    def fingerprint(self) -> str:
        return f"{self.repo}@{self.revision}, {self.num_shards} shards, first {self.files[0]}"

    def shard_sizes(self) -> list[int]:
        return [1] * self.num_shards  # the Hub's data sets are cut evenly

    def check(self) -> None:
        """Make one small request. Raises NetworkError if the Hub cannot be reached, DataError if it lacks the file."""
        try:
            self._open(0).probe()
        except NetworkError as error:
            raise NetworkError(f"{error}; check the connection, or use data=local path=GLOB or data=stdlib") from None

    def documents(self, shard: int, start: int = 0, step: int = 1, offset: int = 0) -> Iterator[Document]:
        def opener() -> BinaryIO:
            return cast(BinaryIO, io.BufferedReader(self._open(shard), 1 << 16))

        return read_documents(opener, f"{self.repo}/{self.files[shard]}", self.bad, start, step, offset)

    def _open(self, shard: int) -> "HubFile":
        import huggingface_hub  # 0.3 s, and needed for this source only

        file = self.files[shard]
        url = huggingface_hub.hf_hub_url(self.repo, file, repo_type="dataset", revision=self.revision)
        return HubFile(url, f"{self.repo}/{file}", self.retry or DEFAULT_RETRY)


class HubFile(io.RawIOBase):
    """The content of a URL as a file to be read once from front to back; connections that break are replaced.

    Messages call it `name`. Reading raises NetworkError when the retries are used up, DataError for a refusal (4xx).
    """

    def __init__(self, url: str, name: str, retry: RetryPolicy) -> None:
        self.url = url
        self.name = name
        self.retry = retry
        self._size: int | None = None  # known after the first response
        self._fetched = 0  # bytes received since the beginning
        self._block = memoryview(b"")  # received and not yet read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        if not self._block:
            self._block = memoryview(self._fetch())
        count = min(len(buffer), len(self._block))
        buffer[:count] = self._block[:count]
        self._block = self._block[count:]
        return count

    def probe(self) -> None:
        """Request one byte, with few retries. Raises NetworkError or DataError."""
        for attempt in range(self.retry.start_retries + 1):
            try:
                next(self._request(0, 1), None)
                return
            except ConnectionError as error:
                if attempt == self.retry.start_retries:
                    raise NetworkError(f"cannot reach {self.url}: {error}") from None
                time.sleep(self.retry.first_wait)

    def _fetch(self) -> bytes:
        """The next range_bytes of the file (fewer at its end), through as many connections as it takes."""
        block = bytearray()
        attempts = 0
        while (missing := self.retry.range_bytes - len(block)) > 0 and self._fetched != self._size:
            try:
                for chunk in self._request(self._fetched, missing):
                    block += chunk
                    self._fetched += len(chunk)
                    attempts = 0
            except ConnectionError as error:
                attempts += 1
                if attempts > self.retry.retries:
                    raise NetworkError(
                        f"lost the connection to {self.url} and gave up after {attempts} attempts: {error}"
                    ) from None
                wait = min(self.retry.first_wait * 2 ** (attempts - 1), self.retry.max_wait)
                logger.warning(
                    f"{self.name}: {error}; retry {attempts} of {self.retry.retries} in {wait:g} s "
                    f"from byte {self._fetched:,}",
                    extra=ANY_RANK,
                )
                time.sleep(wait)
        return bytes(block)

    def _request(self, first: int, count: int) -> Iterator[bytes]:
        """Make one request for bytes first .. first + count - 1 and yield them as they arrive.

        Raises ConnectionError if another attempt may succeed (network errors, silence, an early end, 5xx), DataError
        if not (4xx).
        """
        from huggingface_hub import get_session
        from huggingface_hub.utils import build_hf_headers

        headers = build_hf_headers() | {"Range": f"bytes={first}-{first + count - 1}", "Accept-Encoding": "identity"}
        try:
            with get_session().stream(
                "GET", self.url, headers=headers, timeout=self.retry.timeout, follow_redirects=True
            ) as response:
                self._size, skip = self._read_head(response.status_code, response.headers, first)
                expected = min(count, self._size - first)
                for chunk in response.iter_raw():
                    useful = chunk[skip:][:expected]
                    skip -= min(skip, len(chunk))
                    expected -= len(useful)
                    if useful:
                        yield useful
                    if expected <= 0:
                        return
        except (DataError, ConnectionError):
            raise
        except Exception as error:  # of the HTTP library, whose exception classes change between releases
            raise ConnectionError(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from error
        if expected > 0:
            raise ConnectionError(f"the server ended {expected:,} bytes too early")

    def _read_head(self, status: int, headers: Mapping[str, str], first: int) -> tuple[int, int]:
        """The size of the file, and the bytes of this response to skip before byte `first`: a server without ranges
        answers 200 and sends the whole file. Raises for an error status, as _request does."""
        if status >= 500 or status in RETRIED_STATUS:
            raise ConnectionError(f"the server answered {status}")
        if status == 206:
            return int(headers["Content-Range"].rpartition("/")[2]), 0
        if status == 416:  # the file ends at `first`
            return first, 0
        if status == 200:
            return int(headers["Content-Length"]), first
        reason = REFUSALS.get(status, "the server refuses the request")
        raise DataError(f"{self.url}: {reason} (HTTP {status}); check its name and revision")
