"""States on disk: one file in a format that holds numbers and text only, or a directory that keeps the last few."""

from ebm_ppl.checkpoint.directory import Checkpoints as Checkpoints
from ebm_ppl.checkpoint.manifest import Manifest as Manifest
from ebm_ppl.checkpoint.sharded import restore_sharded as restore_sharded
from ebm_ppl.checkpoint.sharded import save_sharded as save_sharded
from ebm_ppl.checkpoint.states import read_manifest as read_manifest
from ebm_ppl.checkpoint.states import restore as restore
from ebm_ppl.checkpoint.states import save as save
