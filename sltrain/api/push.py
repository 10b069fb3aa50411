"""An exported folder -> a model repository on the Hugging Face Hub, through huggingface_hub.

`Destination` is made before anything is exported, because a wrong name or token should cost seconds. The repository is
created where it does not exist; weight files of an earlier upload that the folder does not have are deleted there, and
everything else in it stays.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from sltrain.log import first_line

logger = logging.getLogger(__name__)

STALE = ["*.safetensors", "*.safetensors.index.json"]


class Destination:
    """The repository USER/NAME. Raises ValueError for a name that cannot be one, without a token, and with a token that
    the Hub refuses; OSError if the Hub cannot be reached."""

    def __init__(self, repo: str, private: bool) -> None:
        try:
            validate_repo_id(repo)
        except HFValidationError as error:
            raise ValueError(f"--push {repo}: {first_line(error)} Write USER/NAME") from error
        if repo.count("/") != 1:
            raise ValueError(f"--push {repo}: write USER/NAME, the user or the organization first")
        self.repo, self.private = repo, private
        self._api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        with _readable_errors(f"--push {repo}"):
            self._api.whoami()

    def upload(self, folder: Path) -> str:
        """Upload an exported folder and return the address of the repository. Raises ValueError if it would be public
        although it should be private, OSError if the Hub refuses or cannot be reached."""
        with _readable_errors(
            f"{folder} is exported but not uploaded, sltrain-export {folder} --push {self.repo} does"
        ):
            address = self._api.create_repo(self.repo, private=self.private or None, exist_ok=True)
            if self.private and not self._api.model_info(self.repo).private:
                raise ValueError(
                    f"{self.repo} exists and is public, so nothing was uploaded: make it private in its settings, "
                    "choose another name, or drop --private"
                )
            self._api.upload_folder(
                repo_id=self.repo, folder_path=folder, commit_message="Upload by sltrain-export", delete_patterns=STALE
            )
        return str(address)


@contextmanager
def _readable_errors(what: str) -> Iterator[None]:
    """Turn what the Hub and its client raise into errors of one line that begin with `what`."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise ValueError(
            f"{what}: there is no token of the Hugging Face Hub; run `hf auth login`, or set HF_TOKEN "
            "(https://huggingface.co/settings/tokens, with the right to write)"
        ) from error
    except (HTTPError, RuntimeError, OSError) as error:  # RuntimeError: a file's upload failed, its cause says why
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
        raise OSError(f"{what}: {' '.join(str(cause).split()) or type(cause).__name__}") from error
