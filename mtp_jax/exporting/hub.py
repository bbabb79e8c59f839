"""Upload of an exported folder to the Hugging Face hub."""

from pathlib import Path

from mtp_jax.errors import UserError, reason


def check_hub(repo: str) -> None:
    """Raise UserError for an impossible repository name, or where nobody is logged in."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {repo}: {error}") from error
    if "/" not in repo:
        raise UserError(f"--push-to-hub {repo}: needs an owner, such as you/{repo}.")
    if not get_token():
        raise UserError(
            f"--push-to-hub {repo}: there is no token for the Hugging Face hub; run `hf auth login`, or set HF_TOKEN."
        )


def upload(folder: Path, repo: str) -> str:
    """Upload a folder as a model repository, in one commit; returns its address.

    Raises:
        UserError: the hub refused, or cannot be reached; the folder stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi()
    try:
        url = api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload from mtp_jax")
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(
            f"--push-to-hub {repo}: {folder} is written, but the hub refused it: {reason(error)}"
        ) from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("httpx", "httpcore", "requests", "httpx2"):
            raise
        raise UserError(
            f"--push-to-hub {repo}: {folder} is written, but the hub cannot be reached ({error})."
        ) from error
    return str(url)
