"""Keeps other libraries' chatter off the terminal; their warnings stay."""

import logging
import os
import warnings

# (message, why it may go)
_KNOWN = (
    (r"`isinstance\(treespec, LeafSpec\)` is deprecated", "lightning's own use of torch"),
    (r"The 'val_dataloader' does not have many workers", "batches are lists: nothing to load"),
    (r"It is recommended to use .*sync_dist", "all ranks log the same values"),
    (r"Glyph .* missing from font", "a picture of a text in a script that the font lacks"),
    (r"The 'train_dataloader' does not have many workers", "batches are lists: nothing to load"),
)


def quiet() -> None:
    """Called once, before anything heavy is imported by a stage."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    for name in ("httpx", "httpx2", "matplotlib", "absl", "datasets", "filelock", "fsspec"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message, _ in _KNOWN:
        warnings.filterwarnings("ignore", message=message)
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging as transformers_logging

    disable_progress_bar()
    transformers_logging.disable_progress_bar()
