"""The bundled models' files and how they are read.

    tiny/     a text-to-image latent diffusion model in diffusers layout
    flow/     a flow transformer in SD3's layout over the VAE and the text encoder of tiny/
    ranker/   an image-text ranker: open_clip_config.json, open_clip_model.safetensors, token_ids.json

All weights are float16 safetensors. Both text towers use CLIP's token ids, but store only the token embeddings of the
training images' grammar. `token_ids.json` is the ascending list of these ids, and `expand_embedding` makes the table for
CLIP's whole vocabulary. The keys to expand before `load_state_dict` are

    tiny/text_encoder/model.safetensors          the one that ends with `embeddings.token_embedding.weight`
    ranker/open_clip_model.safetensors           `text.token_embedding.weight`

`model_cfg` of the ranker's config builds an `open_clip.model.CustomTextCLIP` with the full vocabulary (without its key
`custom_text`, which names that class to `open_clip.create_model`). It is a residual network, so its batch statistics
are part of the weights: evaluate it in `eval()` mode. Images are resized to `preprocess_cfg["size"]` and normalised
with `preprocess_cfg["mean"]` and `["std"]`; texts are padded with 0 after the end token, as open_clip's tokenizer does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...pipelines.core.errors import LoadError

FOLDER = Path(__file__).parent
VOCABULARY = 49408  # of CLIP's byte-pair tokenizer
FLOW_TEXT_LENGTH = 24  # tokens that prompts of the flow model are padded to; longer prompts keep their length

BUNDLED = "bundled"
BUNDLED_FLOW = "bundled flow"
BUNDLED_MODELS = (BUNDLED, BUNDLED_FLOW)  # the flow model is loaded from its files where they have been trained

TINY_FILES = (
    "model_index.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/token_ids.json",
    "scheduler/scheduler_config.json",
)
FLOW_FILES = (
    "model_index.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "scheduler/scheduler_config.json",
)
RANKER_FILES = ("open_clip_config.json", "open_clip_model.safetensors", "token_ids.json")


def expand_embedding(rows: Tensor, ids: Sequence[int], vocabulary: int = VOCABULARY) -> Tensor:
    """The embedding table [vocabulary, D] of stored `rows` [n, D], where row i belongs to token `ids[i]`.

    Every other token gets the mean of the rows. A word outside the grammar then has the scale that the transformer was
    trained on and resembles no particular word.
    Args:
        rows: the stored embeddings [n, D].
        ids: the token id of each row.
        vocabulary: number of tokens.
    Returns: [vocabulary, D].
    Raises: LoadError if rows and ids do not fit each other or the vocabulary.
    """
    index = torch.as_tensor(ids, dtype=torch.long, device=rows.device)
    if rows.ndim != 2 or index.shape != rows.shape[:1] or len(index.unique()) != len(index):
        raise LoadError(f"embedding {list(rows.shape)} does not fit {len(index)} token ids: files of two models")
    if len(index) == 0 or int(index.min()) < 0 or int(index.max()) >= vocabulary:
        raise LoadError(f"token ids must be in 0..{vocabulary - 1}: token_ids.json is not of this vocabulary")
    table = rows.float().mean(0).to(rows.dtype).repeat(vocabulary, 1)
    table[index] = rows
    return table


def tiny_folder() -> Path:
    """The bundled diffusion model, in diffusers layout. Raises LoadError if a file is missing."""
    return _complete(FOLDER / "tiny", TINY_FILES)


def bundled_models() -> list[str]:
    """The names of the bundled models whose files are there."""
    return [BUNDLED, *([BUNDLED_FLOW] if (FOLDER / "flow" / FLOW_FILES[1]).is_file() else [])]


def flow_folder() -> Path:
    """The bundled flow transformer, in diffusers layout. Raises LoadError if a file is missing."""
    return _complete(FOLDER / "flow", FLOW_FILES)


def ranker_folder() -> Path:
    """The bundled ranker, in open_clip's layout. Raises LoadError if a file is missing."""
    return _complete(FOLDER / "ranker", RANKER_FILES)


def _complete(folder: Path, names: Sequence[str]) -> Path:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise LoadError(
            f"the bundled folder {folder.name!r} lacks {', '.join(missing)}: reinstall EditKit, "
            "or rebuild the files with `python -m editkit.training`"
        )
    return folder
